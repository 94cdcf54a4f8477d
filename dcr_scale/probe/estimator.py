r"""From inner products of sketches to ‖K‖²_F, its parts by layer, and its standard error.

For two prompts let h be the final hidden states, W [V, D] the head, Θ the kernel of h over the counted parameters but
the head's, c = h'·h (plus 1 where the head has a bias that counts). Then

    K = c I + A,   A = W Θ Wᵀ (and, where the head is the embedding, the cross terms of its two uses).

With Gaussian u_r, E u_rᵀ A u_r = tr A, and for r ≠ s, E (u_rᵀ A u_s)² = ‖A‖²_F, also where both prompts share their
probes: the terms r = s would be biased and are left out. So

    ‖K‖²_F = c² V + 2 c tr A + ‖A‖²_F.

u_rᵀ A u_s is the inner product of the gradients of (Wᵀu_r)·h' and (Wᵀu_s)·h, estimated from sketches in several
independent *blocks*. Squaring one estimate would add its variance; products of independent blocks do not. Blocks are
the sketch groups. A single group is cut into four, upper and lower rows by left and right columns: those that share
neither are independent.

The contribution of layer l is ⟨K_l, K⟩_F with K_l its part of K. Contributions add up to ‖K‖²_F, together with that
of what stands outside the layers: embedding, norms, head.

Shape suffixes: S slices (layers and one more), G blocks, I and J prompts, R probes (twice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """How independent blocks are combined.

    ``weights`` float64 [G, G]: symmetric, sums to 1, zero where two blocks are not independent. ``splits``: ways to
    part the blocks into independent replicates, each a tensor [n, G] whose rows average a replicate's blocks.
    """

    weights: Tensor
    splits: list[Tensor]

    @classmethod
    def of(cls, groups: int) -> Blocks:
        if groups > 1:
            weights = (1 - torch.eye(groups, dtype=torch.float64)) / (groups * (groups - 1))
            return cls(weights, [torch.eye(groups, dtype=torch.float64)])
        # Blocks in the order (rows, columns) = 00, 01, 10, 11.
        weights = torch.eye(4, dtype=torch.float64).flip(0) / 4
        rows = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=torch.float64) / 2
        columns = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.float64) / 2
        return cls(weights, [rows, columns])


def cut_into_blocks(sketches: Tensor, rank: int) -> Tensor:
    """Sketches [..., G, C] as [..., blocks, C'] whose inner products are unbiased, block by block."""
    if sketches.shape[-2] > 1:
        return sketches
    half = rank // 2
    *lead, _, width = sketches.shape
    quarters = sketches.view(*lead, width // rank**2, 2, half, 2, half)
    at = len(lead)
    order = [*range(at), at + 1, at + 3, at, at + 2, at + 4]
    # A quarter holds a quarter of the products; the sketch's own scale was that of all of them.
    return 2 * quarters.permute(order).reshape(*lead, 4, width // 4)


@dataclass(frozen=True)
class Estimate:
    """Estimates for pairs of prompts: float64 [I, J], ``by_layer`` [layers, I, J].

    ``known``: c² V, the part of ``squared`` that is no estimate. ``deviations`` float64 [K, I, J]: a root of the
    errors' covariance. Two entries of ``squared`` have the covariance Σ_k of the products of their deviations: prompts
    share probes and projections, so their errors go together. They are those of jackknives: see :func:`jackknives`.
    """

    squared: Tensor
    known: Tensor
    deviations: Tensor
    by_layer: Tensor

    def fields(self) -> tuple[Tensor, ...]:
        return self.squared, self.known, self.deviations, self.by_layer


def estimate(products: Tensor, cross: Tensor | None, c: Tensor, vocabulary: int, blocks: Blocks) -> Estimate:
    """Unbiased ‖K‖²_F and its parts from inner products of sketches.

    Args:
        products: float64 [S, G, I, J, R, R], block by block and slice by slice; the last slice is outside the layers.
        cross: float64 [I, J, R, R], what a tied head adds to every u_rᵀ A u_s, or None.
        c: float64 [I, J], the head's own part (0 where the head does not count).
        vocabulary: V.
        blocks: how blocks combine.
    """
    probes = products.shape[-1]
    total = products.sum(dim=0)  # [G, I, J, R, R]
    if cross is not None:
        total = total + cross
    weights = blocks.weights.to(total)
    partner = torch.einsum("gh,hijrs->gijrs", weights, total)
    apart = 1 - torch.eye(probes, dtype=total.dtype, device=total.device)
    pairs = probes * (probes - 1)

    squares = (total * partner).sum(dim=0) * apart  # [I, J, R, R]
    traces = total.mean(dim=0).diagonal(dim1=-2, dim2=-1)  # [I, J, R]
    known = c**2 * vocabulary
    squared = known + 2 * c * traces.mean(dim=-1) + squares.sum(dim=(-2, -1)) / pairs
    layers = products[:-1]
    partner = partner * apart
    by_layer = torch.stack([(layer * partner).sum(dim=(0, -2, -1)) for layer in layers]) / pairs
    by_layer = by_layer + c * layers.mean(dim=1).diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    deviations = [*_probe_deviations(traces, squares, c), *_sketch_deviations(total, c, blocks, apart / pairs)]
    return Estimate(squared, known, torch.stack(deviations), by_layer)


def jackknives(groups: int, probes: int) -> list[int]:
    """How many replicates each jackknife leaves out in turn; their deviations follow one another in this order.

    With n replicates and deviation d_k, the estimate without replicate k is T + d_k √(n / (n − 1)), and the variance
    is Σ d_k². A jackknife of 1 is none, but the error's size by a formula.
    """
    return ([1, 2] if probes == 2 else [probes]) + ([groups] if groups > 1 else [2, 2])


def _probe_deviations(traces_IJR: Tensor, squares_IJRR: Tensor, c: Tensor) -> Iterator[Tensor]:
    """Deviations over the draw of output probes: the delete-one jackknife.

    With two probes no product is left when one is left out: the products' part is then that of Gaussian ones,
    (u_rᵀ A u_s)² having a variance of at most 2 ‖A‖⁴ where A has many directions.
    """
    probes = traces_IJR.shape[-1]
    square_sum = squares_IJRR.sum(dim=(-2, -1))
    replicates = 2 * c[..., None] * (traces_IJR.sum(dim=-1, keepdim=True) - traces_IJR) / (probes - 1)
    if probes == 2:
        yield square_sum / 2**0.5
    else:
        left_out = squares_IJRR.sum(dim=-1) + squares_IJRR.sum(dim=-2)
        replicates = replicates + (square_sum[..., None] - left_out) / ((probes - 1) * (probes - 2))
    yield from _deviations(replicates.movedim(-1, 0))


def _sketch_deviations(total: Tensor, c: Tensor, blocks: Blocks, pair_weights: Tensor) -> Iterator[Tensor]:
    """Deviations over the draw of projections: the infinitesimal jackknife over replicates of the sketch."""
    mean = total.mean(dim=0)
    influence = 2 * torch.einsum("gijrs,ijrs,rs->gij", total, mean, pair_weights)
    influence = influence + 2 * c * total.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    for split in blocks.splits:
        values = torch.einsum("ng,gij->nij", split.to(total), influence)
        # A mean of n values without one of them is the mean, less that one's distance from it by n − 1.
        yield from _deviations((values.sum(dim=0) - values) / (len(values) - 1))


def _deviations(replicates: Tensor) -> Tensor:
    """Of leave-one-out replicates [n, …], as :func:`jackknives` says."""
    count = len(replicates)
    return (replicates - replicates.mean(dim=0)) * ((count - 1) / count) ** 0.5


def log_error(estimated: Tensor, deviations: Tensor, counts: Sequence[int]) -> Tensor:
    """Standard error of log T by the jackknife of the logarithm: [I, J], NaN where T or a replicate is not positive."""
    variance = torch.zeros_like(estimated)
    for part, count in zip(deviations.split(list(counts)), counts, strict=True):
        if count == 1:
            variance = variance + (part[0] / estimated) ** 2
        else:
            logs = (1 + part * (count / (count - 1)) ** 0.5 / estimated).log()
            variance = variance + (count - 1) * logs.var(dim=0, correction=0)
    return variance.sqrt().where(estimated > 0, torch.nan)


def student_t(level: float, degrees: float) -> float:
    """Two-sided quantile of Student's t: P(|t| ≤ x) = level. Raises ValueError for a level outside (0, 1)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; it is {level}")
    return float(stats.t.ppf((1 + level) / 2, degrees))


def signed_root(squared: Tensor) -> Tensor:
    """sign(x) √|x|: a norm from an unbiased estimate of its square, which can be negative near zero."""
    return squared.sign() * squared.abs().sqrt()
