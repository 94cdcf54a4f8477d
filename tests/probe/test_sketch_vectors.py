"""Sketches of vectors' gradients: exact while a vector is no longer than its sketch, unbiased beyond."""

from __future__ import annotations

import pytest
import torch
from toy_models import toy_model

from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import TokenLayout
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.sketch import SketchSink
from dcr_scale.probe.units import select, take_inventory

# The toy's norms are vectors of 16.
INVENTORY = take_inventory(toy := toy_model("llama"), select(toy, r"input_layernorm\.weight$"))
HEAD = Head(INVENTORY, seed=0, probes=2)
ROWS = 3
LAYOUT = TokenLayout(torch.arange(ROWS)[:, None], torch.ones(ROWS, 1, dtype=torch.bool), (1, ROWS))


def products(gradients_BD: torch.Tensor, rank: int, groups: int, seed: int) -> torch.Tensor:
    """[G, B, B]: inner products of the rows' sketches, where every unit's gradient is the same."""
    sink = SketchSink(INVENTORY, Projections(seed, rank, groups), HEAD, ROWS)
    sink.begin(LAYOUT)
    for unit in INVENTORY.units:
        sink.vector(unit, gradients_BD)
    sink.end()
    sketches_GBC = torch.cat(sink.slices, dim=2).transpose(0, 1)
    return sketches_GBC @ sketches_GBC.mT


@pytest.mark.parametrize("rank", [4, 8])
def test_a_vector_no_longer_than_its_sketch_is_exact_in_every_group(rank: int) -> None:
    gradients = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    exact = len(INVENTORY.units) * gradients @ gradients.T
    torch.testing.assert_close(products(gradients, rank, 2, seed=0), exact.expand(2, ROWS, ROWS))


@pytest.mark.parametrize(("rank", "groups"), [(2, 2), (2, 3), (4, 1)])
def test_other_vectors_are_projected_without_bias(rank: int, groups: int) -> None:
    gradients = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    exact = len(INVENTORY.units) * gradients @ gradients.T
    found = torch.stack([products(gradients, rank, groups, seed) for seed in range(400)]).double()
    standard_error = found.std(dim=0) / len(found) ** 0.5
    assert (found.std(dim=0) > 0).all()
    assert ((found.mean(dim=0) - exact).abs() < 4.5 * standard_error).all()
