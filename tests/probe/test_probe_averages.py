"""Averages over pairs of prompts: their errors are those that repeated draws of prompts and probes show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dcr_scale.errors import UserError
from dcr_scale.probe import KernelSimilarity
from dcr_scale.similarity.averages import Averages, averages
from dcr_scale.similarity.prompts import Classes, Prompt


def paired_classes(pairs: int) -> Classes:
    """As many prompts of each class, matched one to one."""
    prompts = [Prompt(f"{side}{i}", f"p{i}", f"pair p{i}", "here") for side in "ab" for i in range(pairs)]
    return Classes(("a", "b"), tuple(prompts), pairs)


def measurement(squared_NN: Tensor, deviations_KNN: Tensor | None = None) -> KernelSimilarity:
    deviations_KNN = squared_NN.new_zeros(0, *squared_NN.shape) if deviations_KNN is None else deviations_KNN
    return KernelSimilarity(
        squared_NN,
        torch.zeros_like(squared_NN),
        deviations_KNN,
        squared_NN[None] * torch.tensor([0.25, 0.5]).view(2, 1, 1),
        squared_NN.diagonal(),
        deviations_KNN.diagonal(dim1=1, dim2=2),
        probes=4 if len(deviations_KNN) else 0,
        jackknives=(len(deviations_KNN),),
    )


def drawn(generator: torch.Generator, pairs: int) -> Tensor:
    """Squares of 2 · pairs prompts whose sizes differ from pair to pair, smaller across classes than within."""
    size = torch.randn(pairs, generator=generator, dtype=torch.float64).mul(0.4).exp().repeat(2)
    noise = torch.randn(2 * pairs, 2 * pairs, generator=generator, dtype=torch.float64).mul(0.1).exp()
    in_a = torch.arange(2 * pairs) < pairs
    kind = torch.where(in_a[:, None] == in_a[None, :], 0.5, 0.2)
    kind.fill_diagonal_(1.0)
    return size[:, None] * size[None, :] * kind * (noise + noise.T) / 2


def every(found: Averages, attribute: str) -> dict[str, float]:
    everything = {**found.groups, "across_over_within": found.across_over_within}
    return {name: getattr(average, attribute) for name, average in everything.items()}


def test_the_bootstrap_s_error_is_that_of_other_prompts():
    generator = torch.Generator().manual_seed(0)
    classes = paired_classes(12)
    found = [averages(measurement(drawn(generator, 12)), classes, seed=seed) for seed in range(80)]
    for name in every(found[0], "value"):
        values = torch.tensor([every(one, "value")[name] for one in found])
        error = torch.tensor([every(one, "stderr_prompts")[name] for one in found]).square().mean().sqrt().item()
        # The standard deviation of 80 values is known to 8 %; a bootstrap of 12 units falls short by 1 in 24.
        assert values.std().item() < 1.3 * error, name
        # What belongs to a pair alone, and not to its prompts, counts up to three times: that is most of the ratio's.
        assert values.std().item() > (0.5 if name == "across_over_within" else 0.75) * error, name
        intervals = torch.tensor([every(one, "interval")[name] for one in found])
        covered = (intervals[:, 0] < values.mean()) & (values.mean() < intervals[:, 1])
        assert covered.double().mean() > 0.85, name


def test_the_estimator_s_error_is_that_of_other_probes():
    """The delta method against draws from the covariance that the deviations stand for."""
    generator = torch.Generator().manual_seed(1)
    classes, squared_NN = paired_classes(5), drawn(torch.Generator().manual_seed(2), 5)
    deviations = 0.03 * squared_NN * torch.randn(6, 10, 10, generator=generator, dtype=torch.float64)
    deviations = (deviations + deviations.transpose(1, 2)) / 2
    errors = every(averages(measurement(squared_NN, deviations), classes, seed=0), "stderr_estimator")
    values: dict[str, list[float]] = {name: [] for name in errors}
    for _ in range(150):
        z = torch.randn(6, 1, 1, generator=generator, dtype=torch.float64)
        one = averages(measurement(squared_NN + (z * deviations).sum(dim=0)), classes, seed=0)
        for name, value in every(one, "value").items():
            values[name].append(value)
    for name, error in errors.items():
        # The standard deviation of 150 values is known to 6 %.
        assert torch.tensor(values[name]).std().item() == pytest.approx(error, rel=0.2), name


def test_an_error_that_all_prompts_share_cancels():
    squared_NN = drawn(torch.Generator().manual_seed(0), 4)
    found = averages(measurement(squared_NN, torch.stack([0.5 * squared_NN])), paired_classes(4), seed=0)
    assert max(every(found, "stderr_estimator").values()) < 1e-12
    assert min(every(found, "stderr_prompts").values()) > 1e-3


def test_layers_add_up_to_the_squares():
    found = averages(measurement(drawn(torch.Generator().manual_seed(0), 4)), paired_classes(4), seed=0)
    for name, parts in found.layers.items():
        torch.testing.assert_close(parts.mean, found.groups[name].value ** 2 * torch.tensor([0.25, 0.5]).double())
        assert (parts.lower < parts.mean).all() and (parts.mean < parts.upper).all()


def test_a_prompt_whose_own_kernel_is_lost_in_noise_is_left_out():
    """Its row would be divided by nothing; as x it still counts."""
    squared_NN = drawn(torch.Generator().manual_seed(0), 4)
    squared_NN[1, 1] = -0.1
    found = averages(measurement(squared_NN), paired_classes(4), seed=0)
    assert found.left_out == 1
    assert found.groups["within_a"].pairs == 9
    rows = [0, 2, 3]
    kept = torch.stack([squared_NN[i, j] / squared_NN[i, i] for i in rows for j in range(4) if i != j])
    assert found.groups["within_a"].value == pytest.approx(kept.mean().sqrt().item())
    squared_NN[range(4), range(4)] = -0.1
    with pytest.raises(UserError, match="no prompt's own kernel is positive"):
        averages(measurement(squared_NN), paired_classes(4), seed=0)
