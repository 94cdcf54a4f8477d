"""Over many seeds the estimates are right on average, and their intervals hold the truth as often as they say."""

from __future__ import annotations

import pytest
import torch
from toy_models import PROMPTS_A, PROMPTS_B, reference, toy_model

from dcr_scale.probe import KernelProbe
from dcr_scale.probe.capture import Capture

SEEDS = 200


def assert_unbiased(estimates: torch.Tensor, truth: torch.Tensor) -> None:
    error = estimates.mean(dim=0) - truth
    assert (error.abs() < 4.5 * estimates.std(dim=0) / len(estimates) ** 0.5).all(), error / truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tied", "groups", "one_backward"),
    [("llama", True, 4, True), ("llama", False, 1, False), ("qwen3", False, 2, True), ("qwen3-moe", True, 4, True)],
)
def test_the_mean_is_the_truth_and_intervals_cover_it(
    monkeypatch: pytest.MonkeyPatch, family: str, tied: bool, groups: int, one_backward: bool
):
    """``one_backward``: as under ZeRO-3, a row for each probe in one pass."""
    monkeypatch.setattr(Capture, "one_backward", one_backward)
    model = toy_model(family, tied=tied)
    squared, by_layer = reference(model.double(), PROMPTS_A, PROMPTS_B)
    selves, _ = reference(model, PROMPTS_A, PROMPTS_A)
    model.float()
    results = [KernelProbe(model, groups=groups, seed=seed).measure(PROMPTS_A, PROMPTS_B) for seed in range(SEEDS)]
    estimates = torch.stack([result.squared for result in results])
    assert_unbiased(estimates, squared)
    assert_unbiased(torch.stack([result.self_squared for result in results]), selves.diagonal())
    assert_unbiased(torch.stack([result.by_layer for result in results]), by_layer)
    covered = torch.stack(
        [(low <= squared) & (squared <= high) for low, high in (result.interval(0.95) for result in results)]
    ).double()
    assert 0.9 <= covered.mean() <= 0.99, covered.mean(dim=0)
    # No pair pays for the others: a true coverage of 0.9 is 4.5 standard errors above this with so many seeds.
    assert covered.mean(dim=0).min() >= 0.8, covered.mean(dim=0)
    # Wider intervals hold more, narrower ones less.
    narrow = torch.stack([(r.interval(0.5)[0] <= squared) & (squared <= r.interval(0.5)[1]) for r in results])
    assert narrow.double().mean() < covered.mean() - 0.1
