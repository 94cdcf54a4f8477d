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
# A set of prompts with itself is cut into so many blocks, or nearly, as half of its pairs mirror the others. More would
# leave out more of them, in products that are thinner and take as long.
_BANDS = 4


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
        order = _positions(items.argsort())
        return dict(enumerate(rows[order] for rows in slices))
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


def _positions(which: Tensor) -> slice | Tensor:
    """``which`` (int64 [n]) as what to index by: a slice, which makes views, where they follow one another."""
    first, count = int(which[0]) if len(which) else 0, len(which)
    follow = torch.equal(which, torch.arange(first, first + count, device=which.device))
    return slice(first, first + count) if follow else which


class Products:
    """Inner products of sketches in float64, blocks of pairs at a time.

    Args:
        own: this rank's slices, each float32 [N · R, G, C]: items are prompts by probes, prompt-major.
        slices: how many there are over all ranks.
        rank: the sketches' rank p.
        probes: R.
    """

    def __init__(self, own: dict[int, Tensor], slices: int, rank: int, probes: int):
        self.slices, self.probes = slices, probes
        self._own = [cut_into_blocks(x, rank) for x in own.values()]

    def blocks(self, pairs: Sequence[tuple[Tensor, Tensor]], paired: bool) -> list[Tensor]:
        """This rank's slices: float64 [S_own, G, I, J, R, R] for prompts left × right (int64 [I], [J]) of each of
        ``pairs``, or [S_own, G, I, 1, R, R] for pairs (left[i], right[i])."""
        probes, groups = self.probes, self._own[0].shape[1] if self._own else 1
        found = [
            torch.empty(
                len(self._own), groups, len(left), probes, 1 if paired else len(right), probes,
                dtype=torch.float64, device=left.device,
            )
            for left, right in pairs
        ]  # fmt: skip
        # Outside the loops: asking a GPU waits for it.
        places = [(_positions(left), _positions(right)) for left, right in pairs]
        for s, x in enumerate(self._own):
            for group in range(groups):
                # One matrix at a time is held at this precision, and is in the caches for all of the blocks.
                sketches_NRC = x[:, group].double().unflatten(0, (-1, probes))
                for products, (left, right) in zip(found, places, strict=True):
                    a, b, into = sketches_NRC[left], sketches_NRC[right], products[s, group]
                    if paired:
                        into[:, :, 0] = a @ b.mT
                    else:
                        torch.mm(a.flatten(0, 1), b.flatten(0, 1).mT, out=into.flatten(2, 3).flatten(0, 1))
        return [products.transpose(3, 4) for products in found]


def pair_blocks(
    rows: int, columns: int, slices: int, blocks: int, probes: int, *, symmetric: bool = False
) -> list[tuple[range, range]]:
    """Rows and columns of the blocks that pairs are worked on in, whatever the number of ranks.

    ``symmetric``: rows and columns are the same prompts, and every block begins at the diagonal.
    """
    height = max(1, min(rows, _BLOCK_BYTES // (_pair_bytes(slices, blocks, probes) * columns)))
    if symmetric:
        # So many bands that little more than the triangle is left.
        height = min(height, -(-rows // _BANDS))
    return [
        (range(start, min(start + height, rows)), range(start if symmetric else 0, columns))
        for start in range(0, rows, height)
    ]


def _pair_bytes(slices: int, blocks: int, probes: int) -> int:
    """Of one pair's inner products."""
    return 8 * slices * blocks * probes**2


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
    # As many blocks at once as have room, for a sketch is read once for all of them.
    largest = max(len(rows) * len(columns) for rows, columns in cut)
    at_once = max(1, _BLOCK_BYTES // (_pair_bytes(products.slices, len(blocks.weights), products.probes) * largest))
    for start in range(0, len(cut), size * at_once):
        ahead = cut[start : start + size * at_once]
        pieces = products.blocks([prompts(*pairs) for pairs in ahead], paired)
        for first in range(0, len(ahead), size):
            turn = ahead[first : first + size]
            sent = pieces[first : first + size]
            received = exchange(sent + [sent[0][:0]] * (size - len(turn)))
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
        assert local is not None
        return [local]
    if local is None:
        packed = torch.empty(0, dtype=torch.float64, device=device)
    else:
        packed = torch.cat([local.squared[None], local.known[None], local.deviations, local.by_layer])
    shared = []
    for received in exchange([packed] * world_size())[:count]:
        (squared, known), deviations, by_layer = received.cpu().split([2, len(received) - 2 - layers, layers])
        shared.append(Estimate(squared, known, deviations, by_layer))
    return shared
