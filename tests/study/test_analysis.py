"""Methods compared at equal defence: lines through points, ratios where both exist, intervals that mean something."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from dcr_scale.evaluation.intervals import bootstrap
from dcr_scale.study.analysis import Curve, common_defence, curves, ratio, ratios_by_seed
from dcr_scale.study.verdict import by_all_seeds, shown

CLASSES = {"asked": "seemingly_toxic", "attack": "toxic", "plain": "general"}


def line(method: str, points: list[tuple[float, float]], prompts: int = 400, seeds: int = 1) -> Curve:
    """A curve through (defence success, refusals of seemingly toxic prompts), the same for all seeds."""

    def refused(rates: list[float]) -> np.ndarray:
        one = np.array([[k < rate * prompts for k in range(prompts)] for rate in rates])
        return np.repeat(one[None], seeds, axis=0)

    rates = {"attack": [d for d, _ in points], "asked": [s for _, s in points], "plain": [0.1] * len(points)}
    return Curve(
        method,
        tuple(range(seeds)),
        tuple(range(len(points))),
        {name: refused(rates[name]) for name in CLASSES},
        CLASSES,
    )


def test_a_line_is_read_between_its_points_and_nowhere_else() -> None:
    curve = line("stl", [(0.2, 0.1), (0.6, 0.5)])
    np.testing.assert_allclose(curve.at(np.array([0.2, 0.4, 0.6])), [0.1, 0.3, 0.5], atol=1e-9)
    assert np.isnan(curve.at(np.array([0.1, 0.7]))).all()


def test_the_ratio_is_taken_at_equal_defence() -> None:
    """Half the refusals at each defence success are a ratio of one half, whichever shares led there."""
    stl = line("stl", [(0.2, 0.2), (0.8, 0.8)])
    dcr = line("dcr", [(0.1, 0.05), (0.5, 0.25), (0.9, 0.45)])
    found = ratio(dcr, stl, draws=300)
    assert found.estimate == pytest.approx(0.5)
    assert 0.4 < found.low < 0.5 < found.high < 0.6


def test_models_that_refuse_more_of_everything_are_no_worse() -> None:
    """A point further along the same line is no difference, though it refuses more harmless prompts."""
    stl, eager = line("stl", [(0.1, 0.1), (0.5, 0.5)]), line("dcr", [(0.4, 0.4), (0.9, 0.9)])
    found = ratio(eager, stl, draws=300)
    assert found.estimate == pytest.approx(1.0)
    assert found.low < 1 < found.high


def test_no_common_defence_is_no_comparison() -> None:
    assert ratio(line("dcr", [(0.1, 0.1), (0.2, 0.1)]), line("stl", [(0.6, 0.3), (0.8, 0.5)])) is None


def test_a_method_of_one_model_is_compared_at_its_defence() -> None:
    stl, scans = line("stl", [(0.2, 0.2), (0.8, 0.8)]), line("scans", [(0.5, 0.25)])
    assert ratio(scans, stl, draws=300).estimate == pytest.approx(0.5)


def test_seeds_are_compared_with_themselves() -> None:
    """STL's seeds differ far; a method that is STL at the one seed it has refuses neither more nor less."""
    lines = [line("stl", [(0.2, low), (0.8, 4 * low)]) for low in (0.05, 0.1, 0.2)]
    refused = {name: np.concatenate([one.refused[name] for one in lines]) for name in CLASSES}
    stl = replace(lines[0], seeds=(0, 1, 2), refused=refused)
    same = replace(lines[2], method="dcr", seeds=(2,))
    assert ratio(same, stl, draws=300).estimate == 1.0
    assert ratio(replace(same, seeds=(7,)), stl) is None
    whole = ratio(stl, replace(stl, method="dcr"), draws=300)
    assert (whole.low, whole.estimate, whole.high) == (1.0, 1.0, 1.0), "both methods are drawn alike"


def test_seeds_that_disagree_widen_the_interval() -> None:
    """And each is told by itself."""
    stl = line("stl", [(0.2, 0.2), (0.8, 0.8)], seeds=3)
    agreeing = line("dcr", [(0.2, 0.1), (0.8, 0.4)], seeds=3)
    lines = [line("dcr", [(0.2, 0.2 * by), (0.8, 0.8 * by)]) for by in (0.2, 0.5, 0.8)]
    refused = {name: np.concatenate([one.refused[name] for one in lines]) for name in CLASSES}
    disagreeing = replace(agreeing, refused=refused)
    assert ratios_by_seed(disagreeing, stl) == pytest.approx([0.2, 0.5, 0.8], abs=0.01)
    assert ratios_by_seed(disagreeing.of_seeds([1, 2]), stl) == pytest.approx([0.5, 0.8], abs=0.01)
    narrow, wide = ratio(agreeing, stl, draws=300), ratio(disagreeing, stl, draws=300)
    assert narrow.estimate == pytest.approx(wide.estimate, abs=0.01)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_seeds_of_two_studies_are_put_together() -> None:
    """A seed with half of STL's refusals and, on other prompts, one with a quarter."""
    first = {"stl": line("stl", [(0.4, 0.4), (0.9, 0.8)]), "dcr": line("dcr", [(0.4, 0.2), (0.9, 0.4)])}
    other = {
        "stl": replace(line("stl", [(0.4, 0.4), (0.9, 0.8)], prompts=200), seeds=(1,)),
        "dcr": replace(line("dcr", [(0.4, 0.1), (0.9, 0.2)], prompts=200), seeds=(1,)),
    }
    studies = [(first, []), (other, [])]
    rows = by_all_seeds(studies, "dcr")
    # t(1 degree, 95 %) = 12.706 by a standard error of ln(2) / 2, around the root of 1/2 · 1/4.
    low, high = (0.125**0.5 * math.exp(sign * 12.706 * math.log(2) / 2) for sign in (-1, 1))
    assert rows[0] == ("refused seemingly toxic prompts, × STL", "0.50, 0.25", f"0.35 [{low:.2f}, {high:.2f}]")
    assert rows[1][1:] == ("1.00, 1.00", "1.00 [1.00, 1.00]")
    assert rows[2][1:] == ("", "–"), "no perplexity was measured"
    assert len(rows) == 3, "nor any kernel"


def test_each_prompt_is_read_between_the_models_on_either_side() -> None:
    """At half the way a prompt that one of the two refuses counts one half."""
    curve = line("stl", [(0.2, 0.1), (0.6, 0.5)], prompts=10)
    np.testing.assert_allclose(curve.each("asked", 0.4), [1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0])
    assert curve.each("asked", 0.7) is None


def test_the_interval_covers_an_equal_method_as_often_as_it_claims() -> None:
    """Two methods of the same truth, outcomes drawn anew: 1 lies in about 95 of 100 intervals."""
    generator = np.random.default_rng(0)

    def drawn(method: str) -> Curve:
        truth = {"attack": [0.3, 0.8], "asked": [0.2, 0.6], "plain": [0.1, 0.1]}
        refused = {name: generator.random((1, 2, 60)) < np.array(truth[name])[None, :, None] for name in CLASSES}
        return Curve(method, (0,), (0.25, 0.5), refused, CLASSES)

    covered = 0
    for _ in range(100):
        found = ratio(drawn("dcr"), drawn("stl"), draws=100)
        covered += found.low <= 1 <= found.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(("defence", "left_out"), [(0.55, (0.0, 0.05)), (0.8, (0.2, 0.8))])
def test_one_model_at_the_end_of_a_line_leaves_draws_out(defence: float, left_out: tuple[float, float]) -> None:
    """A method of one model of STL's truth: within the line the interval holds 1; at its end draws go without a ratio,
    their share is told, and the rest still hold 1 more often than not."""
    generator = np.random.default_rng(0)

    def drawn(method: str, defences: list[float]) -> Curve:
        truth = {"attack": defences, "asked": [0.8 * x for x in defences], "plain": [0.1] * len(defences)}
        size = 1, len(defences), 240
        refused = {name: generator.random(size) < np.array(truth[name])[None, :, None] for name in CLASSES}
        return Curve(method, (0,), tuple(range(len(defences))), refused, CLASSES)

    found = [ratio(drawn("dcr", [defence]), drawn("stl", [0.3, 0.8]), draws=200) for _ in range(60)]
    compared = [interval for interval in found if interval is not None]
    covered = [interval.low <= 1 <= interval.high for interval in compared]
    assert np.mean(covered) > 0.8
    assert left_out[0] <= np.mean([interval.undefined for interval in compared]) <= left_out[1]
    assert ("of draws" in shown(compared[0])) == (compared[0].undefined > 0.05)


def test_all_draws_at_once_are_the_draws_one_by_one() -> None:
    """The ratio of each draw, from counts, is that of the curves indexed by the draw."""
    generator = np.random.default_rng(1)

    def drawn(method: str, rates: list[float]) -> Curve:
        refused = {name: generator.random((3, len(rates), 12)) < np.array(rates)[None, :, None] for name in CLASSES}
        return Curve(method, (0, 1, 2), tuple(range(len(rates))), refused, CLASSES)

    ours, theirs = drawn("dcr", [0.3, 0.5, 0.7]), drawn("stl", [0.4, 0.8])

    def one(at: Mapping[str, np.ndarray]) -> float:
        taken = [
            replace(line, refused={name: x[at["seed"]][:, :, at[name]] for name, x in line.refused.items()})
            for line in (ours, theirs)
        ]
        low, high = common_defence(*taken)
        if low > high:
            return math.nan
        mine, other = (line.at(np.linspace(low, high, 33)).mean() for line in taken)
        return mine / other if other else math.nan

    slow, fast = bootstrap(one, ours.sizes(), draws=200), ratio(ours, theirs, draws=200)
    for of in ("estimate", "low", "high", "undefined"):
        assert getattr(fast, of) == pytest.approx(getattr(slow, of), rel=1e-12)


def record(method: str, seed: int, share: float, refused: str) -> dict:
    """A record whose single prompts are refused (r) or not, one letter a suite."""
    verdicts = {
        name: {"refusal_percent": [90 if letter == "r" else 10], "openings": "-"}
        for name, letter in zip(CLASSES, refused, strict=True)
    }
    return {"cell": {"method": method, "seed": seed, "share": share}, "suites": verdicts}


def test_a_seed_without_all_shares_is_left_out() -> None:
    records = [record("dcr", 0, 0.25, "-r-"), record("dcr", 0, 0.5, "rr-"), record("dcr", 1, 0.5, "rrr")]
    found = curves(records, CLASSES)["dcr"]
    assert found.shares == (0.25, 0.5)
    assert found.seeds == (0,)
    assert found.rates("seemingly_toxic").tolist() == [0, 1]
    assert found.rates("general").tolist() == [0, 0]
    assert curves(records, CLASSES, by="phrases")["dcr"].rates("seemingly_toxic").tolist() == [0, 0]


def test_records_of_other_suites_are_refused() -> None:
    with pytest.raises(ValueError, match="judged on"):
        curves([{"cell": {"method": "dcr", "seed": 0, "share": 0.5}, "suites": {"other": {}}}], CLASSES)
