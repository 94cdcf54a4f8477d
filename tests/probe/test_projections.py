"""Projections in strips: the matrix they stand for, what groups and ranks have in common, and their errors."""

from __future__ import annotations

import pytest
import torch

from dcr_scale.probe.projections import Projections

NAME, ROLE = "layers.0.weight", "in"


def as_matrix(projections: Projections, width: int, start: int = 0) -> torch.Tensor:
    """[G, rank, width], from what the projection makes of the unit vectors: row i where it belongs."""
    projected_pGM = projections.project(NAME, ROLE, torch.eye(width), start)
    by_strip = projected_pGM.unflatten(0, (projections.strips(width), -1))
    return by_strip.permute(2, 1, 0, 3).flatten(1, 2)


@pytest.mark.parametrize(
    ("rank", "groups", "width", "strips"),
    [(16, 1, 64, 1), (16, 2, 64, 2), (16, 4, 64, 4), (16, 16, 64, 8), (16, 3, 64, 1), (6, 4, 64, 2), (16, 4, 63, 1)],
)
def test_every_row_reads_one_strip_and_every_strip_as_many_rows(rank, groups, width, strips):
    projections = Projections(0, rank, groups)
    assert projections.strips(width) == strips
    matrix = as_matrix(projections, width)
    reads = matrix.abs().view(groups, rank, strips, -1)
    expected = torch.eye(strips).repeat(rank // strips, 1)[None, :, :, None].expand_as(reads)
    assert torch.equal(reads, expected)


def test_what_a_row_reads_depends_on_the_seed_and_the_number_of_strips_alone():
    large = as_matrix(Projections(3, 32, 12), 64)
    assert torch.equal(as_matrix(Projections(3, 16, 4), 64), large[:4, :16])
    assert not torch.equal(as_matrix(Projections(4, 16, 4), 64), large[:4, :16])
    uncached = Projections(3, 32, 12, cache_bytes=0)
    assert torch.equal(as_matrix(uncached, 64), large)
    # With fewer strips, rows read more columns, and the same signs stand elsewhere.
    for rank, groups in ((16, 2), (6, 4)):
        fewer = Projections(3, rank, groups)
        assert fewer.strips(64) < 4
        assert not torch.equal(as_matrix(fewer, 64), large[:groups, :rank])
    # Columns from 64 on are others: those of the next expert.
    assert not torch.equal(as_matrix(uncached, 64, start=64), large)


def test_inner_products_are_unbiased_and_err_as_those_of_dense_projections():
    torch.manual_seed(0)
    x, y = torch.randn(2, 64)
    truth = x @ y

    def estimates(groups: int) -> torch.Tensor:
        found = []
        for seed in range(500):
            projections = Projections(seed, 8, groups)
            strips = projections.strips(64)
            sides = projections.project(NAME, ROLE, torch.stack([x, y]))
            found.append((sides[..., 0] * sides[..., 1]).sum(dim=0) * strips / 8)
        return torch.cat(found)

    sparse, dense = estimates(4), estimates(1)
    assert abs(sparse.mean() - truth) < 4.5 * sparse.std() / len(sparse) ** 0.5
    # By the formula of both: (‖x‖²‖y‖² + ⟨x, y⟩² − 2 Σ x_i² y_i²) / p.
    variance = (x.square().sum() * y.square().sum() + truth**2 - 2 * (x * y).square().sum()) / 8
    # Five standard errors of a variance from 2,000 and from 500 draws; parts of random vectors differ a little in norm.
    assert abs(sparse.var() / variance - 1) < 0.16 + 0.08
    assert abs(dense.var() / variance - 1) < 0.32
