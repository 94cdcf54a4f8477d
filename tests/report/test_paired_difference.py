"""The interval of a difference of paired rates, by which a report tells a change from chance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dcr_scale.evaluation.intervals import paired_rate_difference


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """24 prompts, answered before and after: rare and common changes, outcomes that go together and that do not."""
    generator = np.random.default_rng(0)
    for cells in ([0.85, 0.1, 0.03, 0.02], [0.4, 0.1, 0.3, 0.2], [0.02, 0.0, 0.08, 0.9]):
        truth, covered = cells[1] - cells[2], 0
        draws = generator.choice(4, size=(1500, 24), p=cells)
        for drawn in draws:
            ours, theirs = (drawn <= 1).tolist(), ((drawn == 0) | (drawn == 2)).tolist()
            found = paired_rate_difference(ours, theirs)
            covered += found.low <= truth <= found.high
        assert covered / len(draws) > 0.93, cells


def test_it_is_narrower_for_outcomes_that_go_together_and_turns_with_the_order() -> None:
    ours = [True] * 12 + [False] * 12
    together, apart = ours[:8] + [False] * 16, [False] * 16 + ours[:8]
    close, wide = paired_rate_difference(ours, together), paired_rate_difference(ours, apart)
    assert close.estimate == wide.estimate == pytest.approx(4 / 24)
    assert close.high - close.low < wide.high - wide.low
    turned = paired_rate_difference(together, ours)
    assert (turned.low, turned.high) == pytest.approx((-close.high, -close.low))


def test_of_many_prompts_it_is_that_of_the_normal_law() -> None:
    """±1.96·√((b + c − (b − c)²/n)/n²) of b prompts that went one way and c that went the other."""
    n, b, c = 100_000, 9_000, 4_000
    ours = [True] * b + [False] * c + [True] * 60_000 + [False] * (n - b - c - 60_000)
    theirs = [False] * b + [True] * c + ours[b + c :]
    found = paired_rate_difference(ours, theirs)
    half = 1.96 * math.sqrt((b + c - (b - c) ** 2 / n) / n**2)
    assert (found.low, found.high) == pytest.approx((0.05 - half, 0.05 + half), abs=2e-5)


def test_no_change_in_few_prompts_is_not_certainty() -> None:
    found = paired_rate_difference([False] * 8, [False] * 8)
    assert found.estimate == 0 and found.low < -0.2 and found.high > 0.2
    with pytest.raises(ValueError, match="3 and 2 outcomes"):
        paired_rate_difference([True] * 3, [True] * 2)
