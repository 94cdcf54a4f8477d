"""How sure a figure is: Wilson's interval for a rate, the paired bootstrap for anything else, and the ROC's area."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its two-sided interval; ``undefined`` is the share of a bootstrap's draws that had no value and are
    left out."""

    estimate: float
    low: float
    high: float
    undefined: float = 0.0

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def as_dict(self) -> dict[str, float]:
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate: all p for which |p̂ − p| ≤ z·√(p(1 − p)/n).

    Unlike p̂ ± z·√(p̂(1 − p̂)/n) it is of use where nothing, or everything, was refused. Source: E. B. Wilson,
    Journal of the American Statistical Association 22 (1927). Raises ValueError for counts that make no rate.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials} is no rate: there must be trials, and no more successes than those")
    z = _z(confidence)
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Rounding must not push the ends of 0 and 1 past them.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return Interval(rate, low, high)


def paired_rate_difference(ours: Sequence[bool], theirs: Sequence[bool], confidence: float = CONFIDENCE) -> Interval:
    """Rate of ``ours`` minus rate of ``theirs``, outcomes of the same prompts in order, with Newcombe's interval.

    The square-and-add interval from Wilson's of the two rates, less what their correlation φ takes off: unlike a
    bootstrap it is of use where few prompts, or none, came out differently. Source: R. G. Newcombe, Statistics in
    Medicine 17 (1998), p. 2635, method 8. Raises ValueError for outcomes of no, or not the same, prompts.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} outcomes are not of the same prompts")
    both = sum(a and b for a, b in zip(ours, theirs, strict=True))
    first, second = wilson(sum(ours), len(ours), confidence), wilson(sum(theirs), len(theirs), confidence)
    neither = len(ours) - sum(ours) - sum(theirs) + both
    margins = sum(ours) * sum(theirs) * (len(ours) - sum(ours)) * (len(theirs) - sum(theirs))
    determinant = both * neither - (sum(ours) - both) * (sum(theirs) - both)
    phi = determinant / math.sqrt(margins) if margins else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    difference = first.estimate - second.estimate
    below = reach(first.estimate - first.low, second.high - second.estimate)
    above = reach(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, difference - below, difference + above)


def bootstrap(
    statistic: Callable[[Mapping[str, np.ndarray]], float],
    sizes: Mapping[str, int],
    *,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile interval of a statistic under resampling of every named axis.

    ``statistic`` gets, for each axis of ``sizes``, int64 indices [size] drawn with replacement (the estimate: all
    of them, in order), and applies them to whatever it compares. Pairing is in that: two methods whose outcomes
    are indexed by the same prompts, and the same seeds, are resampled together, so what they have in common
    cancels.

    >>> outcomes = {"stl": stl_SN, "dcr": dcr_SN}  # refused or not, [seeds, prompts]
    >>> bootstrap(lambda at: (dcr_SN - stl_SN)[np.ix_(at["seed"], at["prompt"])].mean(), {"seed": 3, "prompt": 264})

    A draw whose statistic is not a number (0/0) is left out and counted. Raises ValueError where all are.
    """
    estimate = float(statistic({axis: np.arange(size) for axis, size in sizes.items()}))
    values = np.array([float(statistic(draw)) for draw in resamples(sizes, draws=draws, seed=seed)])
    return percentile_interval(estimate, values, confidence)


def resamples(sizes: Mapping[str, int], *, draws: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """A bootstrap's draws: for each axis of ``sizes`` int64 indices [size], with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield {axis: generator.integers(size, size=size) for axis, size in sizes.items()}


def percentile_interval(estimate: float, values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """A bootstrap's interval from its draws' ``values``, float64 [draws]; NaNs are left out and counted.

    Raises ValueError where all are.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        raise ValueError(f"the statistic has no value in any of {len(values)} draws")
    tail = (1 - confidence) / 2
    # Without interpolation: a ratio's draws may be infinite.
    low, high = np.quantile(defined, [tail, 1 - tail], method="inverted_cdf")
    return Interval(estimate, float(low), float(high), undefined=1 - len(defined) / len(values))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of independent values with Student's t interval, for where they are too few to be resampled: a
    bootstrap of three cannot reach past the least and the greatest. Raises ValueError for fewer than two."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} value has no spread")
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = error * float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def area_under_roc(scores: Sequence[float] | np.ndarray, positive: Sequence[bool] | np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half; nan where a class is empty."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    negatives = np.sort(scores[~positive])
    if not len(negatives) or len(negatives) == len(scores):
        return math.nan
    below = np.searchsorted(negatives, scores[positive], side="left")
    not_above = np.searchsorted(negatives, scores[positive], side="right")
    return float((below + not_above).mean() / 2 / len(negatives))


def area_interval(
    scores: Sequence[float] | np.ndarray,
    positive: Sequence[bool] | np.ndarray,
    clusters: Sequence[str],
    *,
    draws: int = 500,
    seed: int = 0,
) -> Interval:
    """The ROC's area, with a bootstrap over clusters: prompts of one family are not independent."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    places: dict[str, list[int]] = {}
    for i, cluster in enumerate(clusters):
        places.setdefault(cluster, []).append(i)
    members = [np.array(indices) for indices in places.values()]

    def area(at: Mapping[str, np.ndarray]) -> float:
        chosen = np.concatenate([members[i] for i in at["cluster"]])
        return area_under_roc(scores[chosen], positive[chosen])

    return bootstrap(area, {"cluster": len(members)}, draws=draws, seed=seed)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
