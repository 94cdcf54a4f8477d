"""What the study answers: DCR's goals, each with its measure and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcr_scale.evaluation.intervals import Interval, mean_interval
from dcr_scale.study.analysis import Curve, ratio, ratios_by_seed
from dcr_scale.study.methods import BASELINES, METHODS, WITHOUT_STAGE_1

# DCR is to refuse at most so much of what STL refuses among seemingly toxic prompts.
GOAL = 0.75
# Perplexity on held-out general answers may be higher by so much.
_PERPLEXITY = 1.01
# A goal, what was measured, each seed's own measure, and yes, no or open.
Answer = tuple[str, str, str, str]
# A method, and what its model is then: untrained, refined (after stage 1) or aligned (after stage 2).
Moment = tuple[str, str]


def verdict(lines: Mapping[str, Curve], records: Sequence[Mapping[str, Any]], method: str = "dcr") -> list[Answer]:
    """Goal, measured, the same by each seed alone, and yes, no or open for each of DCR's goals. Open: the error bars do
    not decide, or a seed says otherwise.

    ``method``: the kind of DCR that they are asked of.
    """
    if method not in lines:
        return []
    dcr, stl = lines[method], lines["stl"]

    def compared(goal: str, theirs: Curve | None, of_class: str = "seemingly_toxic", *, at_most: float = 1.0) -> Answer:
        found = None if theirs is None else ratio(dcr, theirs, of_class)
        if theirs is None or found is None:
            return goal, "–", "–", "not measured"
        by_seed = ratios_by_seed(dcr, theirs, of_class)
        said = "no" if found.low > 1 or found.estimate > at_most else "open" if found.high >= 1 else "yes"
        return goal, shown(found), _ratios(by_seed), _agreed(said, [value < 1 for value in by_seed])

    others = [*BASELINES[1:], *([WITHOUT_STAGE_1] if METHODS[method].on_top else [])]
    return [
        compared(f"refuses at most {GOAL} of STL's seemingly toxic prompts, interval below 1", stl, at_most=GOAL),
        compared("refuses no more general prompts than STL", stl, "general"),
        _perplexity(records, method),
        *(
            compared(f"refuses fewer seemingly toxic prompts than {METHODS[name].title}", lines.get(name))
            for name in others
        ),
        *_kernel(records, method),
    ]


def by_all_seeds(
    studies: Sequence[tuple[Mapping[str, Curve], Sequence[Mapping[str, Any]]]], method: str
) -> list[tuple[str, str, str]]:
    """Measure, each seed's, and their mean with Student's t interval, by the seeds of several studies together.

    Studies differ in prompts, so that only what each seed says for itself can be put together; the interval holds
    what differs between seeds and between the studies' prompts. ``studies``: lines and records of each.
    """
    records = [record for _, found in studies for record in found]
    rows = []
    for of_class, title in (("seemingly_toxic", "seemingly toxic"), ("general", "general")):
        pairs = [(lines[method], lines["stl"]) for lines, _ in studies if method in lines and "stl" in lines]
        ratios = [each for ours, stl in pairs for each in ratios_by_seed(ours, stl, of_class)]
        rows.append((f"refused {title} prompts, × STL", *_each_and_mean(ratios)))
    rows.append(("perplexity, × STL", *_each_and_mean(_perplexity_by_seed(perplexity_ratios(records, method)), 3)))
    untrained, refined, aligned = (method, "untrained"), (method, "refined"), (method, "aligned")
    for title, before, after in (
        ("kernel similarity of matched pairs, change in stage 1", untrained, refined),
        ("from before stage 1 to after stage 2", untrained, aligned),
        ("from STL's to this, after stage 2", ("stl", "aligned"), aligned),
        ("under STL", ("stl", "untrained"), ("stl", "aligned")),
    ):
        change = kernel_change(records, before, after)
        if change is not None and len(change.by_seed) > 1:
            mean = mean_interval(change.by_seed)
            each = ", ".join(f"{value:+.2f}" for value in change.by_seed)
            rows.append((title, each, f"{mean.estimate:+.3f} [{mean.low:+.3f}, {mean.high:+.3f}]"))
    return rows


def shown(interval: Interval | None) -> str:
    """With the share of draws behind the interval, where it is not nearly all of them."""
    if interval is None:
        return "–"
    behind = f", of {1 - interval.undefined:.0%} of draws" if interval.undefined > 0.05 else ""
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]{behind}"


def _ratios(by_seed: Sequence[float], digits: int = 2) -> str:
    """Each seed's ratio, and the t interval of their geometric mean."""
    each, mean = _each_and_mean(by_seed, digits)
    return each if mean == "–" else f"{each}: {mean[mean.index('[') :]}"


def _each_and_mean(by_seed: Sequence[float], digits: int = 2) -> tuple[str, str]:
    """Each seed's ratio, and their geometric mean with its t interval; a dash where there is none."""
    each = ", ".join("–" if np.isnan(value) else f"{value:.{digits}f}" for value in by_seed)
    if len(by_seed) < 2 or not all(value > 0 for value in by_seed):
        return each, "–"
    logs = mean_interval([float(np.log(value)) for value in by_seed])
    mean, low, high = (f"{np.exp(value):.{digits}f}" for value in (logs.estimate, logs.low, logs.high))
    return each, f"{mean} [{low}, {high}]"


def _agreed(said: str, each: Sequence[bool]) -> str:
    """What all seeds together say, open where it is yes and not every seed by itself says so."""
    return "open" if said == "yes" and not all(each) else said


def perplexity_ratios(records: Sequence[Mapping[str, Any]], method: str) -> dict[tuple[int, float], float]:
    """Of a method's models to STL's, each pair of one seed and share, by those."""
    found: dict[str, dict[tuple[int, float], float]] = {method: {}, "stl": {}}
    for record in records:
        cell = record["cell"]
        found.get(cell["method"], {})[cell["seed"], cell["share"]] = record["perplexity"]["estimate"]
    return {key: found[method][key] / found["stl"][key] for key in sorted(found[method].keys() & found["stl"].keys())}


def _perplexity(records: Sequence[Mapping[str, Any]], method: str) -> Answer:
    ratios = perplexity_ratios(records, method)
    goal = f"perplexity at most {_PERPLEXITY} times STL's"
    if not ratios:
        return goal, "–", "–", "not measured"

    whole, by_seed = _geometric_mean(list(ratios.values())), _perplexity_by_seed(ratios)
    measured = f"{whole:.3f} (of {len(ratios)} models: {min(ratios.values()):.3f} … {max(ratios.values()):.3f})"
    said = _agreed("yes" if whole <= _PERPLEXITY else "no", [value <= _PERPLEXITY for value in by_seed])
    return goal, measured, _ratios(by_seed, 3), said


def _perplexity_by_seed(ratios: Mapping[tuple[int, float], float]) -> list[float]:
    seeds = sorted({seed for seed, _ in ratios})
    return [_geometric_mean([value for (of, _), value in ratios.items() if of == seed]) for seed in seeds]


def _geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _kernel(records: Sequence[Mapping[str, Any]], method: str) -> list[Answer]:
    def change(goal: str, before: Moment, after: Moment, *, falls: bool) -> Answer:
        found = kernel_change(records, before, after)
        if found is None:
            return goal, "–", "–", "not measured"
        said = "open" if abs(found.mean) <= 2 * found.error else "yes" if (found.mean < 0) == falls else "no"
        by_seed = ", ".join(f"{value:+.2f}" for value in found.by_seed)
        if len(found.by_seed) > 1:
            spread = mean_interval(found.by_seed)
            by_seed += f": [{spread.low:+.2f}, {spread.high:+.2f}]"
        return goal, str(found), by_seed, _agreed(said, [(value < 0) == falls for value in found.by_seed])

    untrained, refined, aligned = (method, "untrained"), (method, "refined"), (method, "aligned")
    stl = "stl", "aligned"
    return [
        change("kernel similarity of matched pairs falls in stage 1", untrained, refined, falls=True),
        change("is lower after stage 2 than before stage 1", untrained, aligned, falls=True),
        change("is lower after stage 2 than under STL", stl, aligned, falls=True),
        change("does not fall under STL", ("stl", "untrained"), stl, falls=False),
    ]


@dataclass(frozen=True)
class Change:
    """A mean over pairs of prompts, those of each seed at each share of refusals; its standard error as if other seeds
    trained the same models; and each seed's own mean, which shows what they do."""

    mean: float
    error: float
    pairs: int
    shares: int
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        shares = f" at {self.shares} shares" if self.shares > 1 else ""
        seeds = f"{len(self.by_seed)} seed{'s' if len(self.by_seed) > 1 else ''}"
        return f"{self.mean:+.3f} ± {self.error:.3f} ({self.pairs} pairs{shares}, {seeds})"


def kernel_change(records: Sequence[Mapping[str, Any]], before: Moment, after: Moment) -> Change | None:
    """How normalised kernel similarity of held-out matched pairs differs between two moments, by the seeds, shares and
    pairs that both have; None where there are fewer than two families of prompts.

    Prompts, probes and projections are the same in both, so that most of the estimates' own error cancels; the standard
    error is that over families, which seeds share in part, and shares altogether: residuals of one family are added up
    before they are squared (the cluster-robust error, Liang and Zeger 1986).
    """
    # One stage 1 serves all shares.
    by_share = "aligned" in (before[1], after[1])
    first, last = (_by_family(records, moment, by_share=by_share) for moment in (before, after))
    changes = {key: last[key] - first[key] for key in first.keys() & last.keys()}
    if not changes:
        return None
    mean = float(np.mean(list(changes.values())))
    residuals: dict[str, float] = {}
    for (_, _, family), change in changes.items():
        residuals[family] = residuals.get(family, 0.0) + change - mean
    if len(residuals) < 2:
        return None
    correction = len(residuals) / (len(residuals) - 1)
    error = float(np.sqrt(correction * sum(value**2 for value in residuals.values()))) / len(changes)
    pairs = {(seed, family) for seed, _, family in changes}
    seeds = sorted({seed for seed, _, _ in changes})
    by_seed = (float(np.mean([change for (of, _, _), change in changes.items() if of == seed])) for seed in seeds)
    return Change(mean, error, len(pairs), len({share for _, share, _ in changes}), tuple(by_seed))


def _by_family(
    records: Sequence[Mapping[str, Any]], moment: Moment, *, by_share: bool
) -> dict[tuple[int, float | None, str], float]:
    """Each measured pair's similarity, by seed, share and family."""
    method, when = moment
    return {
        (record["cell"]["seed"], record["cell"]["share"] if by_share else None, family): value
        for record in records
        if record["cell"]["method"] == method and when in record.get("kernel", {})
        for family, value in zip(record["kernel"]["families"], record["kernel"][when], strict=True)
        if value is not None
    }
