"""The study's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dcr_scale.study.analysis import Curve, rate
from dcr_scale.study.methods import METHODS

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


def trade_off(path: Path, lines: Mapping[str, Curve]) -> None:
    """Refusals of seemingly toxic and of general prompts against defence success, a line a method."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharex=True, layout="constrained")
    for axis, of_class, what in zip(axes, ("seemingly_toxic", "general"), ("seemingly toxic", "general"), strict=True):
        for number, name in enumerate(name for name in METHODS if name in lines):
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
                linewidth=2 if name in ("stl", "dcr") else 1, capsize=2, elinewidth=0.6,
                color=_COLOURS[number % len(_COLOURS)], linestyle="-" if number < len(_COLOURS) else "--",
                label=METHODS[name].title,
            )  # fmt: skip
        axis.set_xlabel("defence success (toxic prompts refused)")
        axis.set_ylabel(f"refused, {what} prompts")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
