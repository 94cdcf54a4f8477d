"""Intervals hold what their definitions say, and cover the truth as often as they claim."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dcr_scale.evaluation.intervals import area_interval, area_under_roc, bootstrap, mean_interval, wilson

Z = 1.959963984540054


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_ends_are_where_the_score_test_just_accepts(counts: tuple[int, int]) -> None:
    successes, trials = counts
    found = wilson(successes, trials)
    assert 0 <= found.low <= found.estimate <= found.high <= 1
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(found.estimate - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / trials), rel=1e-6)
    assert (found.low == 0) == (successes == 0)
    assert (found.high == 1) == (successes == trials)


def test_wilson_covers_the_truth_as_often_as_it_claims() -> None:
    """Exactly, over the whole binomial distribution; on average over rates, for n small it wavers."""
    trials = 40
    ends = [wilson(k, trials) for k in range(trials + 1)]
    coverage = [
        sum(
            math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k)
            for k in range(trials + 1)
            if ends[k].low <= rate <= ends[k].high
        )
        for rate in np.linspace(0.02, 0.98, 97)
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("successes, trials", [(0, 0), (3, 2), (-1, 5)])
def test_counts_that_make_no_rate_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {trials} is no rate"):
        wilson(successes, trials)


def test_the_bootstrap_has_the_quantiles_of_all_resamples() -> None:
    """Of three values there are 27 resamples: the interval's ends are those of their distribution."""
    values = np.array([0.0, 1.0, 10.0])
    every = sorted((a + b + c) / 3 for a in values for b in values for c in values)
    found = bootstrap(lambda at: values[at["prompt"]].mean(), {"prompt": 3}, draws=20_000, confidence=0.8)
    # 10 % of 27 is the third smallest, 90 % the 25th.
    assert (found.estimate, found.low, found.high) == (values.mean(), every[2], every[24])


def test_pairing_cancels_what_both_methods_share() -> None:
    """Prompts differ far more than the methods do; unpaired, the same difference would drown."""
    generator = np.random.default_rng(0)
    difficulty_SN = np.repeat(generator.random((1, 300)), 3, axis=0)
    ours = difficulty_SN - 0.02 + 0.01 * generator.standard_normal((3, 300))
    paired = bootstrap(
        lambda at: (ours - difficulty_SN)[np.ix_(at["seed"], at["prompt"])].mean(), {"seed": 3, "prompt": 300}
    )
    assert paired.low < -0.02 < paired.high < 0
    unpaired = bootstrap(
        lambda at: ours[0, at["ours"]].mean() - difficulty_SN[0, at["theirs"]].mean(), {"ours": 300, "theirs": 300}
    )
    assert unpaired.low < 0 < unpaired.high


def test_seeds_count_as_well_as_prompts() -> None:
    """Where seeds disagree, many prompts do not make sure."""
    rates = np.repeat([[0.1], [0.3], [0.5]], 1000, axis=1)
    found = bootstrap(lambda at: rates[np.ix_(at["seed"], at["prompt"])].mean(), {"seed": 3, "prompt": 1000})
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.5))


def test_three_values_are_too_few_to_be_resampled() -> None:
    """Student's t covers their mean as often as it claims; a bootstrap cannot reach past the least and the greatest."""
    generator = np.random.default_rng(0)
    covered = {"t": 0, "bootstrap": 0}
    for values in generator.normal(size=(400, 3)):
        t = mean_interval(values)
        resampled = bootstrap(lambda at, of=values: of[at["value"]].mean(), {"value": 3}, draws=200)
        assert values.min() - 1e-12 <= resampled.low and resampled.high <= values.max() + 1e-12
        covered["t"] += t.low <= 0 <= t.high
        covered["bootstrap"] += resampled.low <= 0 <= resampled.high
    assert 0.92 * 400 <= covered["t"] <= 0.98 * 400
    assert covered["bootstrap"] < 0.85 * 400
    with pytest.raises(ValueError, match="no spread"):
        mean_interval([1.0])


def test_ratios_say_what_is_infinite_and_what_undefined() -> None:
    """Of theirs, a fifth of the draws has no refusal: x/0 is a draw like any other, 0/0 is none."""
    ours, theirs = np.array([1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 0])

    @np.errstate(divide="ignore", invalid="ignore")
    def ratio(at: Mapping[str, np.ndarray]) -> float:
        return ours[at["prompt"]].mean() / theirs[at["prompt"]].mean()

    found = bootstrap(ratio, {"prompt": 5})
    assert found.estimate == 2
    assert found.high == math.inf
    assert 0 < found.undefined < 1
    ours = theirs = np.zeros(5)
    with pytest.raises(ValueError, match="no value in any of 2000 draws"):
        bootstrap(ratio, {"prompt": 5})


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=60))
def test_the_area_is_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    scores, positive = zip(*rows, strict=True)
    area = area_under_roc(scores, positive)
    if len(set(positive)) == 1:
        assert math.isnan(area)
    else:
        assert area == pytest.approx(roc_auc_score(positive, scores))


def test_prompts_of_one_family_are_one_observation() -> None:
    """The same twenty rows ten times over are no surer than once."""
    generator = np.random.default_rng(1)
    scores, positive = generator.random(20), generator.random(20) < 0.5
    families = [str(i) for i in range(20)]
    once = area_interval(scores, positive, families)
    tenfold = area_interval(np.tile(scores, 10), np.tile(positive, 10), families * 10)
    assert (tenfold.low, tenfold.high) == (pytest.approx(once.low), pytest.approx(once.high))
