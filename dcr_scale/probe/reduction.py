"""From sketches spread by prompt to estimates, in an order that does not depend on the number of ranks.

The fixed virtual slices are the decoder layers and what stands outside them. Every slice has one owner, which receives
all prompts' coordinates in it (one all_to_all) and forms that slice's inner products in float64. Blocks of pairs are
then handed to the ranks in turn, each of which adds its block's slices up in the order of the layers.

Shape suffixes as in :mod:`dcr_scale.probe.estimator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dcr_scale.probe.estimator import Blocks, Estimate, cut_into_blocks

# Inner products of one block of pairs, all slices together, in bytes.
_BLOCK_BYTES = 256 * 2**20
# At least so many blocks of a set of prompts with itself: half of its pairs mirror the others.
_BANDS = 8


def owners(slices: int, size: int) -> list[range]:
    """The slices that each rank owns: contiguous, as even as they go."""
    bounds = [slices * rank // size for rank in range(size + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def exchange(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Send ``pieces[r]`` to rank r; returns what every rank sent here. Any shapes, one dtype."""
    if world_size() == 1:
        return list(pieces)
    device = pieces[0].device
    shapes: list = [None] * world_size()
    dist.all_gather_object(shapes, [tuple(piece.shape) for piece in pieces])
    rank = own_rank()
    received = [torch.empty(shape[rank], dtype=pieces[0].dtype, device=device) for shape in shapes]
    sizes = [piece.numel() for piece in pieces]
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    landed = flat.new_empty(sum(piece.numel() for piece in received))
    dist.all_to_all_single(landed, flat, [piece.numel() for piece in received], sizes)
    return [
        part.view_as(piece) for part, piece in zip(landed.split([p.numel() for p in received]), received, strict=True)
    ]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def collect_rows(local: Tensor, items: Tensor, total: int) -> Tensor:
    """Every rank's rows on every rank: ``local`` [n, …] are rows ``items`` (int64 [n]) of the result [total, …]."""
    size = world_size()
    everything = local.new_empty(total, *local.shape[1:])
    rows = exchange([local] * size)
    indices = exchange([items] * size)
    for index, part in zip(indices, rows, strict=True):
        everything[index] = part
    return everything


def own_slices(slices: list[Tensor], items: Tensor, total: int) -> dict[int, Tensor]:
    """Every item's coordinates in the slices that this rank owns: {slice: [total, G, C_s]}."""
    size = world_size()
    if size == 1:
        order = items.argsort()
        return dict(enumerate(_chosen(rows, order, dim=0) for rows in slices))
    shares = owners(len(slices), size)
    sent = [torch.cat([slices[s] for s in share], dim=2) if share else slices[0][:, :, :0] for share in shares]
    rows = exchange(sent)
    indices = exchange([items] * size)
    mine = shares[own_rank()]
    everything = rows[0].new_empty(total, *rows[0].shape[1:])
    for index, part in zip(indices, rows, strict=True):
        everything[index] = part
    widths = [slices[s].shape[2] for s in mine]
    return dict(zip(mine, everything.split(widths, dim=2), strict=True)) if mine else {}


def _chosen(rows: Tensor, which: Tensor, dim: int) -> Tensor:
    """``rows`` at positions ``which`` (int64 [n]) of a dimension: a view where they follow one another."""
    first, count = int(which[0]) if len(which) else 0, len(which)
    if torch.equal(which, torch.arange(first, first + count, device=which.device)):
        return rows.narrow(dim, first, count)
    return rows.index_select(dim, which)


class Products:
    """Inner products of sketches, a block of pairs at a time.

    Args:
        own: this rank's slices, each [N · R, G, C]: items are prompts by probes, prompt-major.
        slices: how many there are over all ranks.
        rank: the sketches' rank p.
        probes: R.
    """

    def __init__(self, own: dict[int, Tensor], slices: int, rank: int, probes: int):
        self.slices, self.probes = slices, probes
        self._own = [
            cut_into_blocks(x, rank)
            .transpose(0, 1)
            .to(torch.float64, memory_format=torch.contiguous_format)
            .unflatten(1, (-1, probes))
            for x in own.values()
        ]  # [G, N, R, C]

    def block(self, left: Tensor, right: Tensor, paired: bool) -> Tensor:
        """This rank's slices: float64 [S_own, G, I, J, R, R] for prompts ``left`` × ``right`` (int64 [I], [J]), or
        [S_own, G, I, 1, R, R] for pairs (left[i], right[i])."""
        if not self._own or not len(left):
            return torch.empty(0, dtype=torch.float64, device=left.device)
        sides = [(_chosen(x, left, 1), _chosen(x, right, 1)) for x in self._own]
        if paired:
            return torch.stack([(a @ b.mT)[:, :, None] for a, b in sides])
        blocks, probes = len(self._own[0]), self.probes
        products = left.new_empty(len(sides), blocks, len(left) * probes, len(right) * probes, dtype=torch.float64)
        for place, (a, b) in zip(products, sides, strict=True):
            torch.bmm(a.flatten(1, 2), b.flatten(1, 2).mT, out=place)
        return products.view(len(sides), blocks, len(left), probes, len(right), probes).transpose(3, 4)


def pair_blocks(
    rows: int, columns: int, slices: int, blocks: int, probes: int, *, symmetric: bool = False
) -> list[tuple[range, range]]:
    """Rows and columns of the blocks that pairs are worked on in, whatever the number of ranks.

    ``symmetric``: rows and columns are the same prompts, and every block begins at the diagonal.
    """
    height = max(1, min(rows, _BLOCK_BYTES // (8 * slices * blocks * columns * probes**2)))
    if symmetric:
        # So many bands that little more than the triangle is left.
        height = min(height, -(-rows // _BANDS))
    return [
        (range(start, min(start + height, rows)), range(start if symmetric else 0, columns))
        for start in range(0, rows, height)
    ]


def estimate_pairs(
    products: Products,
    left: Tensor,
    right: Tensor,
    finish: Callable[[Tensor, Tensor, Tensor, bool], Estimate],
    blocks: Blocks,
    *,
    paired: bool = False,
) -> Estimate:
    """Estimates for all pairs of prompts ``left`` × ``right``, or for the pairs themselves ([I, 1]).

    ``finish`` turns products [S, G, I, J, R, R] of the prompts it is given into estimates. Every rank gets the whole
    result.
    """
    size, mine = world_size(), own_rank()
    symmetric = not paired and torch.equal(left, right)
    cut = pair_blocks(
        len(left), 1 if paired else len(right), products.slices, len(blocks.weights), products.probes,
        symmetric=symmetric,
    )  # fmt: skip

    def prompts(rows: range, columns: range) -> tuple[Tensor, Tensor]:
        chosen = rows if paired else columns
        return left[rows.start : rows.stop], right[chosen.start : chosen.stop]

    found: list[Estimate] = []
    for first in range(0, len(cut), size):
        turn = cut[first : first + size]
        nothing = left[:0]
        pieces = [products.block(*prompts(*pairs), paired) for pairs in turn]
        pieces += [products.block(nothing, nothing, paired)] * (size - len(turn))
        received = exchange(pieces)
        local = None
        if mine < len(turn):
            whole = torch.cat([part for part in received if part.numel()]) if size > 1 else received[0]
            local = finish(whole, *prompts(*turn[mine]), paired)
        found += _share(local, len(turn), products.slices - 1, left.device)
    parts = [estimate.fields() for estimate in found]
    return Estimate(*(_assemble(part, cut, symmetric) for part in zip(*parts, strict=True)))


def _assemble(parts: Sequence[Tensor], cut: Sequence[tuple[range, range]], symmetric: bool) -> Tensor:
    """Blocks of rows [..., I, J] as one tensor, those of a symmetric one mirrored at the diagonal."""
    if not symmetric:
        return torch.cat(list(parts), dim=-2)
    size = cut[0][1].stop
    whole = parts[0].new_empty(*parts[0].shape[:-2], size, size)
    for part, (rows, columns) in zip(parts, cut, strict=True):
        whole[..., rows.start : rows.stop, columns.start : columns.stop] = part
        whole[..., columns.start : columns.stop, rows.start : rows.stop] = part.mT
    return whole


def _share(local: Estimate | None, count: int, layers: int, device: torch.device) -> list[Estimate]:
    """The first ``count`` ranks' estimates on every rank, in main memory: all pairs are many at 8 bytes a number."""
    if world_size() == 1:
        return [local]
    if local is None:
        packed = torch.empty(0, dtype=torch.float64, device=device)
    else:
        packed = torch.cat([local.squared[None], local.deviations, local.by_layer])
    shared = []
    for received in exchange([packed] * world_size())[:count]:
        squared, deviations, by_layer = received.cpu().split([1, len(received) - 1 - layers, layers])
        shared.append(Estimate(squared[0], deviations, by_layer))
    return shared
