"""Figures of where prompts lie to one another: maps of activations, heat maps of similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcr_scale.evaluation.suites import CLASSES
from dcr_scale.report.changes import NAMES
from dcr_scale.report.figures import SYMBOLS, Figure, colour, wrapped

# Cividis, which colour-blind readers see as others do.
SCALE = ("#00224e", "#2a3f6d", "#575d6d", "#7d7c78", "#a59c74", "#d2c060", "#fee838")
_OF_SOURCES = ("circle", "x-thin-open", "triangle-up", "square-open", "star", "cross-thin-open", "hexagon-open")


def activation_maps(activations: Mapping[str, Any]) -> list[Figure]:
    """A map for each look, on axes of its own; the view ``shared`` is on axes that all looks have in common."""
    shared = [point for look in activations["looks"].values() for point in look["shared"]]
    pad = 0.06 * max(max(axis) - min(axis) for axis in zip(*shared, strict=True)) or 1.0
    ranges = [[min(axis) - pad, max(axis) + pad] for axis in zip(*shared, strict=True)]
    figures = []
    for name, look in activations["looks"].items():
        alone = _map(f"map-{name}", name, activations["prompts"], look["points"], look["explained"], None)
        common = _map(
            f"map-{name}-shared", name, activations["prompts"], look["shared"], activations["shared_explained"], ranges
        )
        figures.append(Figure(alone.name, alone.title, alone.data, alone.layout, {"shared": common}))
    return figures


def source_marks(activations: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A character for each source's marker on the maps, and its name."""
    names = list(dict.fromkeys(prompt["source"] for prompt in activations["prompts"]))
    return [("●✕▲□★＋⬡"[i % len(_OF_SOURCES)], name) for i, name in enumerate(names)]


def _map(
    name: str,
    title: str,
    prompts: Sequence[Mapping[str, str]],
    points: Sequence[Sequence[float]],
    explained: Sequence[float],
    ranges: list[list[float]] | None,
) -> Figure:
    sources = list(dict.fromkeys(prompt["source"] for prompt in prompts))
    data = []
    for label in CLASSES:
        # A marker tells the source; where there is one only, it tells the class as it does elsewhere.
        symbols = _OF_SOURCES if len(sources) > 1 else (SYMBOLS[label],)
        own = [i for i, prompt in enumerate(prompts) if prompt["label"] == label]
        if own:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [points[i][0] for i in own],
                    "y": [points[i][1] for i in own],
                    "text": [wrapped(prompts[i]["text"]) for i in own],
                    "hovertemplate": f"<b>{NAMES[label]}</b><br>%{{text}}<extra></extra>",
                    "marker": {
                        "color": colour(label),
                        "symbol": [symbols[sources.index(prompts[i]["source"]) % len(symbols)] for i in own],
                        "size": 7,
                        "opacity": 0.75,
                        # Thin symbols are drawn by their line alone.
                        "line": {"width": 1.5, "color": colour(label)},
                    },
                    "legendgroup": label,
                }
            )
    axes = [
        {"title": {"text": f"component {i + 1}: {share:.0%} of variance"}, "showticklabels": False, "zeroline": False}
        for i, share in enumerate(explained)
    ]
    if ranges is not None:
        for axis, span in zip(axes, ranges, strict=True):
            axis["range"] = span
    layout = {
        "xaxis": axes[0],
        "yaxis": {**axes[1], "scaleanchor": "x"},
        "margin": {"l": 34, "r": 8, "t": 8, "b": 40},
        "height": 340,
        "zoomable": True,
    }
    return Figure(name, title, data, layout)


def cosine_maps(activations: Mapping[str, Any]) -> tuple[list[Figure], tuple[float, float]]:
    """A heat map of cosines for each look, and the range of their one colour scale."""
    prompts = [activations["prompts"][i] for i in activations["cells"]]
    labels = [prompt["label"] for prompt in prompts]
    texts = [wrapped(prompt["text"], most=1) for prompt in prompts]
    looks = activations["looks"]
    low = min(value for look in looks.values() for row in look["cosines"] for value in row)
    low = math.floor(10 * low) / 10
    figures = [
        heat_map(f"cosines-{name}", name, look["cosines"], labels, texts, (low, 1.0), "cosine")
        for name, look in looks.items()
    ]
    return figures, (low, 1.0)


def kernel_maps(kernels: Mapping[str, Any]) -> tuple[list[Figure], tuple[float, float]]:
    """A heat map of kernel similarity at each stage's ends, and the range of their one colour scale.

    Stage 2 begins with the model that stage 1 ended with, which is shown once.
    """
    prompts = kernels["prompts"]
    labels = [prompt["class"] for prompt in prompts]
    texts = [wrapped(prompt.get("prompt", f"general prompt {i + 1}"), most=1) for i, prompt in enumerate(prompts)]
    shown: dict[str, list] = {}
    if "refine" in kernels:
        shown |= {"before": kernels["refine"]["first"], "refined": kernels["refine"]["last"]}
    if "align" in kernels:
        shown |= {"aligned": kernels["align"]["last"]}
        shown = shown if "refine" in kernels else {"before": kernels["align"]["first"], **shown}
    values = sorted(value for matrix in shown.values() for row in matrix for value in row if value is not None)
    # A few rows with a small own kernel would take the whole scale.
    top = max(1.0, values[int(0.99 * (len(values) - 1))]) if values else 1.0
    figures = [
        heat_map(f"kernel-{name}", name, matrix, labels, texts, (0.0, top), "similarity")
        for name, matrix in shown.items()
    ]
    return figures, (0.0, top)


def heat_map(
    name: str,
    title: str,
    matrix: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    texts: Sequence[str],
    span: tuple[float, float],
    what: str,
) -> Figure:
    """A matrix over prompts in the order of their classes, the classes set apart."""
    count = len(labels)
    ends = [i for i in range(1, count) if labels[i] != labels[i - 1]]
    starts = [0, *ends]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*ends, count], strict=True)]
    lines = []
    for at in ends:
        line = {"type": "line", "line": {"color": "var(--paper)", "width": 3}}
        lines.append({**line, "x0": at - 0.5, "x1": at - 0.5, "y0": -0.5, "y1": count - 0.5})
        lines.append({**line, "y0": at - 0.5, "y1": at - 0.5, "x0": -0.5, "x1": count - 0.5})
    ticks = {"tickvals": middles, "ticktext": [NAMES[labels[start]].lower() for start in starts], "showgrid": False}
    data = {
        "type": "heatmap",
        "z": matrix,
        # The page makes of them what a cell shows: written out, they would be the largest part of the report.
        "texts": texts,
        "hovertemplate": f"%{{text}}<br><b>{what} %{{z:.3f}}</b><extra></extra>",
        "zmin": span[0],
        "zmax": span[1],
        "colorscale": [[i / (len(SCALE) - 1), shade] for i, shade in enumerate(SCALE)],
        "showscale": False,
    }
    layout = {
        "xaxis": {**ticks, "range": [-0.5, count - 0.5], "constrain": "domain"},
        "yaxis": {**ticks, "range": [count - 0.5, -0.5], "tickangle": -90, "scaleanchor": "x", "constrain": "domain"},
        "shapes": lines,
        "margin": {"l": 30, "r": 8, "t": 8, "b": 28},
        "height": 330,
    }
    return Figure(name, title, [data], layout)
