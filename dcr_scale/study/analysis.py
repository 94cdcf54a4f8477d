"""Methods compared at equal defence.

A method has one model for each share of refusals in stage 2. More refusals defend better and over-refuse more, so each
model is a point (defence success, refusals of seemingly toxic prompts), both means over suites, and a method is the
line through its points. Two methods are compared where both lines exist: what one refuses there by what the other does.

Shape suffixes: M seeds, S shares, N prompts of a suite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dcr_scale.evaluation.intervals import Interval, bootstrap

Draw = Mapping[str, np.ndarray]
Metric = Literal["judge", "phrases"]

# Of a suite's verdicts in a record: which answers refuse.
_REFUSED: dict[Metric, Callable[[Mapping], list[bool]]] = {
    "judge": lambda verdicts: [percent >= 50 for percent in verdicts["refusal_percent"]],
    "phrases": lambda verdicts: [letter == "r" for letter in verdicts["openings"]],
}


@dataclass(frozen=True)
class Curve:
    """One method's answers.

    ``seeds`` and ``shares`` ascending; ``refused``: by suite, bool [M, S, N]; ``classes``: each suite's.
    """

    method: str
    seeds: tuple[int, ...]
    shares: tuple[float, ...]
    refused: Mapping[str, np.ndarray]
    classes: Mapping[str, str]

    def of_seeds(self, seeds: Collection[int]) -> Curve:
        """The same method by these seeds alone."""
        kept = [at for at, seed in enumerate(self.seeds) if seed in seeds]
        refused = {name: outcomes[kept] for name, outcomes in self.refused.items()}
        return replace(self, seeds=tuple(self.seeds[at] for at in kept), refused=refused)

    def rates(self, of_class: str, draw: Draw | None = None) -> np.ndarray:
        """Refusal rate at each share, float64 [S]: the mean over the class's suites, seeds and (drawn) prompts."""
        means = [self.suite(name, draw) for name, of in self.classes.items() if of == of_class]
        return np.mean(means, axis=0)

    def suite(self, name: str, draw: Draw | None = None) -> np.ndarray:
        """A suite's refusal rate at each share, float64 [S]."""
        refused_MSN = self.refused[name]
        if draw is not None:
            refused_MSN = refused_MSN[draw["seed"]][:, :, draw[name]]
        return refused_MSN.mean(axis=(0, 2))

    def at(self, defence: np.ndarray, draw: Draw | None = None, of_class: str = "seemingly_toxic") -> np.ndarray:
        """Refusal rate of a class where defence success is ``defence`` [K]: float64 [K], NaN beyond the points."""
        reached, refused = self.rates("toxic", draw), self.rates(of_class, draw)
        order = np.argsort(reached, kind="stable")
        return np.interp(defence, reached[order], refused[order], left=np.nan, right=np.nan)

    def each(self, name: str, defence: float) -> np.ndarray | None:
        """How often each prompt of a suite is refused where defence success is ``defence``: float64 [N], means over
        seeds, read between the two models on either side. None beyond the points."""
        reached = self.rates("toxic")
        order = np.argsort(reached, kind="stable")
        if not reached[order[0]] <= defence <= reached[order[-1]]:
            return None
        means_SN = self.refused[name].mean(axis=0)[order]
        return np.array([np.interp(defence, reached[order], means_S) for means_S in means_SN.T])

    def sizes(self) -> dict[str, int]:
        return {"seed": len(self.seeds), **{name: refused.shape[2] for name, refused in self.refused.items()}}


def ratio(ours: Curve, theirs: Curve, of_class: str = "seemingly_toxic", *, draws: int = 2000) -> Interval | None:
    """What ``ours`` refuses by what ``theirs`` does, where both defend equally well.

    The ratio of the two lines' means over the range of defence success that both have, by the seeds that both have;
    None where there is none. The interval is a bootstrap over those seeds and, within each suite, prompts; both methods
    are drawn alike.
    """
    ours, theirs = paired(ours, theirs)
    if not ours.seeds:
        return None

    def statistic(draw: Draw) -> float:
        low, high = common_defence(ours, theirs, draw)
        if high < low:
            return float("nan")
        defence = np.linspace(low, high, 33)
        mine, other = ours.at(defence, draw, of_class).mean(), theirs.at(defence, draw, of_class).mean()
        return float(mine / other) if other else float("nan")

    sizes = ours.sizes()
    whole = {name: np.arange(size) for name, size in sizes.items()}
    return None if np.isnan(statistic(whole)) else bootstrap(statistic, sizes, draws=draws)


def paired(ours: Curve, theirs: Curve) -> tuple[Curve, Curve]:
    """Both by the seeds that both have, which may be none."""
    common = set(ours.seeds) & set(theirs.seeds)
    return ours.of_seeds(common), theirs.of_seeds(common)


def common_defence(ours: Curve, theirs: Curve, draw: Draw | None = None) -> tuple[float, float]:
    """Least and greatest defence success that both lines reach; the first is the greater where there is none. A method
    of one model is compared at that model's."""
    reached = [curve.rates("toxic", draw) for curve in (ours, theirs)]
    return max(r.min() for r in reached), min(r.max() for r in reached)


def rate(curve: Curve, of_class: str, share: int, *, draws: int = 1000) -> Interval:
    """One point of a curve: refusal rate of a class at the ``share``-th share."""
    return bootstrap(lambda draw: float(curve.rates(of_class, draw)[share]), curve.sizes(), draws=draws)


def curves(records: Sequence[Mapping], classes: Mapping[str, str], *, by: Metric = "judge") -> dict[str, Curve]:
    """The curves of finished cells, by method. A seed that lacks one of its method's shares is left out, so that all
    points of a curve have the same seeds.

    ``by``: whether the judge says that an answer refuses, or the list of phrases that open refusals.

    Raises ValueError for records whose suites are not those of ``classes``.
    """
    by_method: dict[str, dict[tuple[int, float], Mapping]] = {}
    for record in records:
        cell = record["cell"]
        if set(record["suites"]) != set(classes):
            raise ValueError(f"{cell}: judged on {sorted(record['suites'])}, not on {sorted(classes)}")
        by_method.setdefault(cell["method"], {})[cell["seed"], cell["share"]] = record
    found = {}
    for method, cells in by_method.items():
        shares = tuple(sorted({share for _, share in cells}))
        seeds = [seed for seed in sorted({seed for seed, _ in cells}) if all((seed, s) in cells for s in shares)]
        if seeds:
            refused = {
                name: np.array([[_REFUSED[by](cells[seed, s]["suites"][name]) for s in shares] for seed in seeds])
                for name in classes
            }
            found[method] = Curve(method, tuple(seeds), shares, refused, classes)
    return found
