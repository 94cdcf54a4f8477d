"""The report's figures as plotly's data and layout, in plain JSON.

A colour is the name of a variable of ``style.css``, such as ``var(--toxic)``: the page puts in what light or dark mode
makes of it, and the axes' common look. Text of prompts is escaped, as plotly reads markup in labels.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcr_scale.evaluation.intervals import Interval
from dcr_scale.report.changes import NAMES, OUTCOMES, Change

SYMBOLS = {"seemingly_toxic": "circle", "toxic": "diamond", "general": "square"}
_OF_MODELS = ("circle-open", "circle", "diamond", "square", "triangle-up", "star")


@dataclass(frozen=True)
class Figure:
    """``name`` is unique in the report; ``views`` are other data for the same place, by what a reader may choose."""

    name: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    views: Mapping[str, Figure] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"data": self.data, "layout": self.layout}


def colour(label: str) -> str:
    return f"var(--{label.replace('_', '-')})"


def wrapped(text: str, width: int = 46, most: int = 4) -> str:
    """A prompt as plotly's markup: escaped, in lines."""
    lines = textwrap.wrap(text, width) or [""]
    shown = lines[:most] + (["…"] if len(lines) > most else [])
    return "<br>".join(map(html.escape, shown))


def error_bars(intervals: Sequence[Interval]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [found.high - found.estimate for found in intervals],
        "arrayminus": [found.estimate - found.low for found in intervals],
        "thickness": 1.2,
        "width": 3,
    }


# --- rates ---------------------------------------------------------------------------------------------------------


def rates(changes: Sequence[Change], names: Sequence[str]) -> Figure:
    """Each class's share of good answers, model after model."""
    data = []
    for place, change in enumerate(changes):
        shift = 0.05 * (place - (len(changes) - 1) / 2)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [i + shift for i in range(len(names))],
                "y": [rate.estimate for rate in change.rates],
                "error_y": error_bars(change.rates),
                "text": [
                    f"{name}: {rate.estimate:.0%} [{rate.low:.0%}, {rate.high:.0%}]"
                    for name, rate in zip(names, change.rates, strict=True)
                ],
                "hovertemplate": f"{NAMES[change.label]}, {OUTCOMES[change.label]}<br>%{{text}}<extra></extra>",
                "line": {"color": colour(change.label), "width": 2},
                "marker": {"color": colour(change.label), "symbol": SYMBOLS[change.label], "size": 9},
                "legendgroup": change.label,
            }
        )
    axis: dict[str, Any] = {
        "tickvals": list(range(len(names))),
        "ticktext": [*names],
        "range": [-0.3, len(names) - 0.7],
    }
    layout = {"xaxis": {**axis, "showgrid": False}, "yaxis": {"range": [-0.02, 1.02], "tickformat": ".0%"}}
    return Figure("rates", "Answered as it should be, with 95 % intervals", data, {**layout, "height": 320})


def suites(found: Mapping[str, Change], models: Sequence[str]) -> Figure:
    """Every suite's share of good answers by model; suites from the top down, in the order given."""
    data: list[dict[str, Any]] = []
    names = list(found)
    for number, model in enumerate(models):
        shift = 0.5 * (number - (len(models) - 1) / 2) / max(len(models), 2)
        colours = [colour(found[name].label) for name in names]
        rates_ = [found[name].rates[number] for name in names]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [rate.estimate for rate in rates_],
                "y": [place + shift for place in range(len(names))],
                "error_x": error_bars(rates_) | {"color": "var(--muted)"},
                "marker": {"color": colours, "symbol": _OF_MODELS[number % len(_OF_MODELS)], "size": 10},
                "text": [
                    f"{html.escape(name)}, {html.escape(model)}<br>{OUTCOMES[found[name].label]} "
                    f"{rate.estimate:.1%} [{rate.low:.1%}, {rate.high:.1%}]"
                    for name, rate in zip(names, rates_, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    rows: dict[str, Any] = {"tickvals": list(range(len(names))), "ticktext": [html.escape(name) for name in names]}
    layout: dict[str, Any] = {
        "xaxis": {"range": [-0.02, 1.02], "tickformat": ".0%"},
        "yaxis": {**rows, "range": [len(names) - 0.5, -0.5], "showgrid": False, "automargin": True},
        "height": 70 + 46 * len(names),
    }
    return Figure("suites", "Answered as they should be, with 95 % intervals", data, layout)


def model_marks(models: Sequence[str]) -> list[tuple[str, str]]:
    """A character for each model's marker in :func:`suites`, and its name."""
    return [("○●◆■▲★"[i % len(_OF_MODELS)], model) for i, model in enumerate(models)]
