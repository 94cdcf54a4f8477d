"""Figures of what moves while a run trains, step by step through both stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcr_scale.report.figures import Figure, colour
from dcr_scale.report.records import Row, RunRecord

_Z = 1.96

KINDS = {
    "within_seemingly_toxic": ("two seemingly toxic prompts", "seemingly_toxic", "circle"),
    "within_toxic": ("two toxic prompts", "toxic", "diamond"),
    "cross": ("a seemingly toxic one and its toxic partner", "cross", "triangle-up"),
    "general": ("a general one and a toxic one", "general", "square"),
}


class Timeline:
    """Steps of both stages on one axis, stage 2 after stage 1."""

    def __init__(self, run: RunRecord):
        last = {stage: max((row["step"] for row in run.rows(stage)), default=0) for stage in ("refine", "align")}
        self.offset = {"refine": 0, "align": last["refine"]}
        self.total = last["refine"] + last["align"]
        every = _round_step(self.total)
        ticks = {
            self.offset[stage] + step: str(step) for stage, steps in last.items() for step in range(0, steps + 1, every)
        }
        boundary = self.offset["align"]
        shapes, notes = [], []
        if last["refine"] and last["align"]:
            ticks = {at: text for at, text in ticks.items() if abs(at - boundary) > 0.12 * self.total}
            ticks[boundary] = f"{last['refine']} | 0"
            shapes.append(
                {
                    "type": "line",
                    "x0": boundary,
                    "x1": boundary,
                    "y0": 0,
                    "y1": 1,
                    "yref": "paper",
                    "line": {"color": "var(--muted)", "width": 1, "dash": "dot"},
                }
            )
        for stage, text in (("refine", "stage 1"), ("align", "stage 2")):
            if last[stage]:
                notes.append(
                    {
                        "x": self.offset[stage] + last[stage] / 2,
                        "y": 1,
                        "yref": "paper",
                        "yanchor": "bottom",
                        "text": text,
                        "showarrow": False,
                        "font": {"color": "var(--muted)", "size": 12},
                    }
                )
        margin = 0.02 * self.total
        self.layout: dict[str, Any] = {
            "xaxis": {
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
                "tickangle": 0,
                "range": [-margin, self.total + margin],
                "title": {"text": "step"},
            },
            "shapes": shapes,
            "annotations": notes,
        }

    def series(self, rows: Sequence[Row], stage: str, key: str) -> tuple[list[int], list[float | None]]:
        """Where a stage's values lie on the axis, and the values."""
        return [self.offset[stage] + row["step"] for row in rows], [row.get(key) for row in rows]


def _round_step(steps: int) -> int:
    """A round number of steps between two ticks, of which at most five fit into so many steps."""
    rough = max(1, steps / 5)
    size = 10 ** math.floor(math.log10(rough))
    return next(int(size * factor) for factor in (1, 2, 5, 10) if size * factor >= rough and size * factor >= 1)


def curve(run: RunRecord, name: str, title: str, key: str, stages: Sequence[str], **axis: Any) -> Figure | None:
    """One value of every step; None where no step has it."""
    timeline, data = Timeline(run), list[dict[str, Any]]()
    for stage in stages:
        x, y = timeline.series(run.rows(stage), stage, key)
        if any(value is not None for value in y):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if len(x) < 3 else "lines",
                    "x": x,
                    "y": y,
                    "customdata": [row["step"] for row in run.rows(stage)],
                    "hovertemplate": "step %{customdata}: %{y:.4g}<extra></extra>",
                    "line": {"color": "var(--accent)", "width": 2},
                }
            )
    if not data:
        return None
    layout = {**timeline.layout, "yaxis": axis, "height": 240}
    if len(stages) == 1:
        xs = data[0]["x"]
        offset, pad = timeline.offset[stages[0]], 0.02 * (xs[-1] - xs[0] + 1)
        every = _round_step(xs[-1] - offset)
        steps = list(range(0, xs[-1] - offset + 1, every))
        layout |= {
            "shapes": [],
            "annotations": [],
            "xaxis": {
                "tickvals": [offset + step for step in steps],
                "ticktext": [str(step) for step in steps],
                "range": [offset - pad, xs[-1] + pad],
                "title": {"text": "step"},
            },
        }
    return Figure(name, title, data, layout)


def probe_curves(run: RunRecord, name: str, title: str, prefix: str, kinds: Mapping[str, tuple]) -> Figure | None:
    """Measurements of the training probe with 95 % intervals; None where there are none.

    ``kinds``: by the key's last part, what it is called, its colour's class and its marker.
    """
    timeline, data = Timeline(run), []
    for kind, (title_of_kind, group, symbol) in kinds.items():
        xs: list[int] = []
        ys: list[float | None] = []
        errors: list[float] = []
        texts: list[str] = []
        for stage in ("refine", "align"):
            rows = [row for row in run.rows(f"{stage}/probe") if row.get(f"{prefix}/{kind}") is not None]
            x, y = timeline.series(rows, stage, f"{prefix}/{kind}")
            xs, ys = xs + x, ys + y
            errors += [_Z * (row.get(f"{prefix}/{kind}_stderr") or 0.0) for row in rows]
            texts += [f"stage {1 if stage == 'refine' else 2}, step {row['step']}" for row in rows]
        if xs:
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": xs,
                    "y": ys,
                    "error_y": {"type": "data", "array": errors, "thickness": 1.2, "width": 3},
                    "text": texts,
                    "hovertemplate": f"{title_of_kind}<br>%{{text}}: %{{y:.3f}}<extra></extra>",
                    "line": {"color": colour(group), "width": 2},
                    "marker": {"color": colour(group), "symbol": symbol, "size": 8},
                    "legendgroup": group,
                }
            )
    if not data:
        return None
    return Figure(name, title, data, {**timeline.layout, "yaxis": {"rangemode": "tozero"}, "height": 320})


def heldout_cosines(run: RunRecord) -> Figure | None:
    """Cosines of held-out prompts through stage 1."""
    rows = run.rows("refine/heldout")
    lines = {
        "cross": ("across the classes", "cross", "triangle-up"),
        "matched": ("matched pairs", "muted", "x-thin-open"),
        "within_seemingly": ("within seemingly toxic", "seemingly_toxic", "circle"),
        "within_toxic": ("within toxic", "toxic", "diamond"),
    }
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [row["step"] for row in rows],
            "y": [row[key] for row in rows],
            "hovertemplate": f"{title}, step %{{x}}: %{{y:.3f}}<extra></extra>",
            "line": {"color": colour(group), "width": 2},
            "marker": {"symbol": symbol, "size": 8, "color": colour(group), "line": {"width": 1.5}},
            "legendgroup": group,
        }
        for key, (title, group, symbol) in lines.items()
        if any(row[key] is not None for row in rows)
    ]
    if not data:
        return None
    layout = {"xaxis": {"title": {"text": "step"}, "rangemode": "tozero"}, "yaxis": {}, "height": 240}
    return Figure("cosines", "Held-out cosine, stage 1", data, layout)
