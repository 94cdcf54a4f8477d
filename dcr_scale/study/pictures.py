"""The study's pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from dcr_scale.study.analysis import Curve, rate
from dcr_scale.study.methods import BASELINES, CLAIMED, METHODS

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


_LINES: dict[str, Any] = {"stl": "--", **dict(zip(CLAIMED, ("-", ":", "-."), strict=True))}
_PAIRS = {"cross": "#009E73", "within_toxic": "#D55E00", "within_seemingly_toxic": "#0072B2", "general": "#7F7F7F"}
_CLASSES = {"toxic": "#D55E00", "seemingly_toxic": "#0072B2", "general": "#7F7F7F"}


def training_curves(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refusal probability and kernel similarity through both stages, as the paper's figures 1 and 3 have them.

    ``records``: of one seed and share, of STL and of what is claimed; those whose training was not measured are left
    out. A stage 1 that two methods share is drawn once.
    """
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col", sharey="row", layout="constrained")
    drawn: list[Any] = []
    for record in records:
        line = _LINES[record["cell"]["method"]]
        for column, stage in enumerate(("refine", "align")):
            curve = record["probe"].get(stage, {}).get("curve", [])
            if not curve or curve in drawn:
                continue
            drawn.append(curve)
            for row, (prefix, kinds) in enumerate((("refusal_probability", _CLASSES), ("kernel", _PAIRS))):
                for kind, colour in kinds.items():
                    _with_error(axes[row, column], curve, f"{prefix}/{kind}", line, colour)
    for column, what in enumerate(("stage 1", "stage 2")):
        axes[1, column].set_xlabel(f"steps of {what}")
    axes[0, 0].set_ylabel("refusal probability")
    axes[1, 0].set_ylabel("kernel similarity")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    beside: dict[str, Any] = {"frameon": False, "fontsize": 8}
    for row, kinds in enumerate((_CLASSES, _PAIRS)):
        handles = [Line2D([], [], color=colour, label=kind.replace("_", " ")) for kind, colour in kinds.items()]
        axes[row, 1].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), **beside)
    shown = {record["cell"]["method"] for record in records}
    handles = [
        Line2D([], [], color="black", linestyle=line, label=METHODS[name].title)
        for name, line in _LINES.items()
        if name in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **beside)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _with_error(axis: Any, curve: Sequence[Mapping[str, Any]], key: str, line: str, colour: str) -> None:
    if key not in curve[0]:
        return
    steps = [point["step"] for point in curve]
    values, errors = ([math.nan if (v := point[k]) is None else v for point in curve] for k in (key, f"{key}_stderr"))
    axis.plot(steps, values, line, color=colour, linewidth=1.5)
    low, high = [[v + by * e for v, e in zip(values, errors, strict=True)] for by in (-1, 1)]
    axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


def trade_off(path: Path, lines: Mapping[str, Curve]) -> None:
    """Refusals of seemingly toxic and of general prompts against defence success: baselines, and what is claimed.

    The other methods' points are grey; the page's tables name them.
    """
    shown = [name for name in METHODS if name in lines and (name in BASELINES or name in CLAIMED)]
    others = [line for name, line in lines.items() if name not in shown]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.8), sharex=True, layout="constrained")
    for axis, of_class, what in zip(axes, ("seemingly_toxic", "general"), ("seemingly toxic", "general"), strict=True):
        for number, line in enumerate(others):
            label = "other kinds of DCR and STL" if number == 0 else None
            axis.plot(line.rates("toxic"), line.rates(of_class), "o", color="#C8C8C8", markersize=4, label=label)
        for colour, name in zip(_COLOURS, shown, strict=False):
            line = lines[name]
            x, y = line.rates("toxic"), line.rates(of_class)
            spread = [rate(line, of_class, at, draws=400) for at in range(len(x))]
            error = [
                [v - i.low for v, i in zip(y, spread, strict=True)],
                [i.high - v for v, i in zip(y, spread, strict=True)],
            ]
            order = x.argsort()
            axis.errorbar(
                x[order], y[order], yerr=[[e[i] for i in order] for e in error], marker="o", markersize=4,
                linewidth=2 if name == "stl" or name in CLAIMED else 1, capsize=2, elinewidth=0.6, color=colour,
                label=METHODS[name].title,
            )  # fmt: skip
        axis.set_xlabel("defence success (toxic prompts refused)")
        axis.set_ylabel(f"refused, {what} prompts")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
