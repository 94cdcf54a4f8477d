"""Padding-free batches: prompts of uneven length in one row of tokens, their shared beginning held once.

Chat templates put the same system header in front of every prompt, often more tokens than the prompt itself. It is
causal, so its activations are the same in every prompt: a pack holds it once, and every prompt's tokens attend to
it as well as to their own past. :mod:`dcr_scale.models.attention` reads the layout.

Shape suffixes: T tokens of the pack, P of the shared prefix, N prompts, L tokens of the longest one after the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Some of a pack's prompts as rows of a padded batch, and the way back.

    ``index`` int64 [N, L]: the token in row i, column t; ``inside`` int64 [tokens]: which of the flattened N · L
    places are no padding; ``tokens`` int64 [tokens]: where in the pack those belong.
    """

    index: Tensor
    inside: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class PackLayout:
    """Where each prompt lies in a pack: tokens [0, prefix) are shared, then ``lengths[i]`` tokens of prompt i."""

    prefix: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def starts(self) -> list[int]:
        """First token of each prompt, and the end of the last: N + 1 numbers."""
        return list(accumulate(self.lengths, initial=self.prefix))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]: the prompts' boundaries in the tokens *after* the prefix, for pooling."""
        return torch.tensor([start - self.prefix for start in self.starts], dtype=torch.int32, device=self.device)

    @cached_property
    def cu_queries(self) -> Tensor:
        """int32: boundaries of the query segments. A shared prefix is a segment of its own, the first."""
        bounds = ([0] if self.prefix else []) + self.starts
        return torch.tensor(bounds, dtype=torch.int32, device=self.device)

    @cached_property
    def cu_keys(self) -> Tensor:
        """int32: boundaries of the key segments in the order of :attr:`key_index`: the prefix, then prefix + prompt."""
        if not self.prefix:
            return self.cu_queries
        sizes = [self.prefix] + [self.prefix + length for length in self.lengths]
        return torch.tensor(list(accumulate(sizes, initial=0)), dtype=torch.int32, device=self.device)

    @cached_property
    def key_index(self) -> Tensor | None:
        """int64: which token each key is; None where keys and queries are the same tokens (no prefix)."""
        if not self.prefix:
            return None
        prefix = torch.arange(self.prefix)
        pieces = [prefix]
        for start, length in zip(self.starts, self.lengths, strict=False):
            pieces += [prefix, torch.arange(start, start + length)]
        return torch.cat(pieces).to(self.device)

    @cached_property
    def padded_rows(self) -> list[PaddedRows]:
        """The prompts as rows of a few padded batches, each of prompts whose lengths lie within a factor of two."""
        by_size: dict[int, list[int]] = {}
        for i, length in enumerate(self.lengths):
            by_size.setdefault((length - 1).bit_length(), []).append(i)
        return [self._rows_of(prompts) for _, prompts in sorted(by_size.items())]

    def _rows_of(self, prompts: list[int]) -> PaddedRows:
        lengths = torch.tensor([self.lengths[i] for i in prompts])[:, None]
        starts = torch.tensor([self.starts[i] for i in prompts])[:, None]
        columns = torch.arange(int(lengths.max()))
        inside = columns < lengths
        # Any token will do for padding: no token of a prompt looks ahead, and what padding computes is dropped.
        index_NL = torch.where(inside, starts + columns, starts)
        return PaddedRows(
            index_NL.to(self.device),
            inside.flatten().nonzero()[:, 0].to(self.device),
            index_NL[inside].to(self.device),
        )

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: a token's position in its own prompt; every prompt goes on where the prefix ends."""
        own = [torch.arange(self.prefix, self.prefix + length) for length in self.lengths]
        return torch.cat([torch.arange(self.prefix), *own]).to(self.device)


@dataclass(frozen=True)
class Pack:
    """One padding-free micro-batch.

    ``input_ids`` int64 [1, T]; ``labels`` int64 [T], the token each position must predict and -100 where no loss is
    taken, or None where the pack only feeds the trunk; ``layout`` says where each prompt lies.
    """

    input_ids: Tensor
    layout: PackLayout
    labels: Tensor | None = None

    @property
    def position_ids(self) -> Tensor:
        return self.layout.positions[None]


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    prefix: int = 0,
    response_starts: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Pack:
    """Lay token sequences side by side, their first ``prefix`` tokens (the same in all) held once.

    Args:
        sequences: token ids, each longer than ``prefix``.
        prefix: how many leading tokens all sequences share.
        response_starts: for each sequence the index of its first response token; labels are then made for the
            response alone. It must be at least 1, and beyond the prefix where there is one.
        device: where the tensors go.

    Raises ValueError for no sequences, a sequence that ends in the prefix, or one that begins otherwise.
    """
    if not sequences:
        raise ValueError("a pack needs at least one sequence")
    shared = list(sequences[0][:prefix])
    for i, sequence in enumerate(sequences):
        if len(sequence) <= prefix:
            raise ValueError(f"sequence {i} has {len(sequence)} tokens, not more than the shared prefix of {prefix}")
        if list(sequence[:prefix]) != shared:
            raise ValueError(f"sequence {i} does not begin with the {prefix} tokens that the others share")
    device = torch.device(device)
    layout = PackLayout(prefix, tuple(len(sequence) - prefix for sequence in sequences), device)
    tokens = shared + [token for sequence in sequences for token in sequence[prefix:]]
    labels = None
    if response_starts is not None:
        labels = torch.full((layout.tokens,), -100)
        for sequence, start, first in zip(sequences, layout.starts, response_starts, strict=False):
            if first <= prefix:
                # The token before the response predicts its first token; it would lie in the shared prefix.
                raise ValueError(f"a response that starts at token {first} lies in the shared prefix of {prefix}")
            offset = start - prefix
            labels[offset + first - 1 : offset + len(sequence) - 1] = torch.tensor(sequence[first:])
        labels = labels.to(device)
    return Pack(torch.tensor([tokens], device=device), layout, labels)


def balanced_groups(costs: Sequence[int], groups: int, loads: Sequence[int] | None = None) -> list[list[int]]:
    """Split items into ``groups`` non-empty groups of nearly equal total cost (longest first, to the lightest).

    ``loads``: what each group carries before it is given any item; null: nothing. Deterministic, so every rank computes
    the same split; returns the items' indices in ascending order. Raises ValueError where there are fewer items than
    groups.
    """
    if len(costs) < groups:
        raise ValueError(f"{len(costs)} items cannot fill {groups} groups")
    members: list[list[int]] = [[] for _ in range(groups)]
    loads = list(loads or [0] * groups)
    first = sorted(range(groups), key=lambda g: (loads[g], g))
    for rank, item in enumerate(sorted(range(len(costs)), key=lambda i: (-costs[i], i))):
        lightest = first[rank] if rank < groups else min(range(groups), key=lambda g: (loads[g], g))
        members[lightest].append(item)
        loads[lightest] += costs[item]
    return [sorted(group) for group in members]


def micro_batches(costs: Sequence[int], *, world_size: int, limit: int, beside: int = 0) -> list[list[list[int]]]:
    """Plan one optimiser step: ``plan[rank][micro_step]`` lists the items of one pack.

    Every rank gets the same number of micro-steps (ZeRO-3's collectives demand it), the fewest that keep every
    pack within ``limit`` tokens (or the longest item's), and nearly equal tokens in all packs. Too few items for
    another micro-step on every rank leave packs over the limit: they then hold about two items each.

    ``beside``: tokens that every rank's first pack carries besides the items.
    """
    # One overlong item must not scatter all the others, nor what stands beside them.
    limit = max([limit, *costs, beside + min(costs)])
    steps = 1
    while True:
        loads = [beside, *[0] * (steps - 1)] * world_size
        groups = balanced_groups(costs, world_size * steps, loads)
        heaviest = max(load + sum(costs[i] for i in group) for load, group in zip(loads, groups, strict=True))
        if heaviest <= limit or world_size * (steps + 1) > len(costs):
            return [groups[rank * steps : (rank + 1) * steps] for rank in range(world_size)]
        steps += 1
