"""Which token of a micro-batch is whose, and which experts it met.

Shape suffixes: B rows of the micro-batch (a prompt under one output probe each), L tokens of the longest, M rows of a
matrix product (tokens, or the (token, slot) pairs of routed experts), D any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a micro-batch belong to which of its rows.

    ``index`` int64 [B, L]: the flat token in row b, column l; ``inside`` bool [B, L]: false for padding, whose index
    is 0. ``shape``: of the model's input ids, padding included. ``cu_seqlens`` int32 [≥ B + 1]: the rows' boundaries
    where they lie one after another without padding, else None. ``last`` int64 [B]: the flat token whose hidden state
    gives the first generated token.
    """

    index: Tensor
    inside: Tensor
    shape: tuple[int, int]
    cu_seqlens: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]

    @cached_property
    def last(self) -> Tensor:
        ends = self.inside.sum(dim=1, keepdim=True) - 1
        return self.index.gather(1, ends)[:, 0]

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor]:
        """The flat tokens of all rows, one row after another, and where each row begins among them."""
        counts = self.inside.sum(dim=1)
        return self.index[self.inside], counts.cumsum(0) - counts

    @cached_property
    def _is_view(self) -> bool:
        """Whether the flat tokens are the rows as they stand: of one length, without padding."""
        return torch.equal(self.index.flatten(), torch.arange(self.tokens, device=self.index.device)) and bool(
            self.inside.all()
        )

    def rows(self, flat: Tensor) -> Tensor:
        """[tokens, …] as [B, L, …], zero where there is no token."""
        if self._is_view:
            return flat.reshape(*self.index.shape, *flat.shape[1:])
        inside = self.inside.view(*self.inside.shape, *(1,) * (flat.dim() - 1))
        return torch.where(inside, flat[self.index], flat.new_zeros(()))

    def split(self, flat: Tensor) -> Tensor:
        """[…, tokens · slots] as […, B, L · slots], zero where there is no token; a token's slots stay together."""
        if self._is_view:
            return flat.unflatten(-1, (len(self.index), -1))
        each = flat.unflatten(-1, (self.tokens, -1))[..., self.index, :]
        inside = self.inside[..., None]
        return torch.where(inside, each, each.new_zeros(())).flatten(-2)

    def sums(self, flat: Tensor, weights: Tensor | None = None) -> Tensor:
        """Σ over each row's tokens: [tokens, D] as [B, D]; ``weights`` [tokens]: what a token is multiplied by."""
        members, starts = self._members
        # A bag of embeddings is just that, in one read and with no copy of the rows.
        weights = weights if weights is None or self._is_view else weights[members]
        return F.embedding_bag(members, flat, starts, mode="sum", per_sample_weights=weights)


@dataclass(frozen=True)
class Routing:
    """Which experts' matrices the rows of a product meet; the rows are sorted by expert.

    ``order`` int64 [M]: the (token, slot) of each row, as token · slots + slot; ``inverse`` the way back; ``tokens``
    int64 [M]: the token of each row; ``experts`` int64 [M]; ``spans``: (expert, first row, end) of every expert met.
    """

    order: Tensor
    inverse: Tensor
    tokens: Tensor
    experts: Tensor
    slots: int
    spans: list[tuple[int, int, int]]

    @classmethod
    def of(cls, index_TK: Tensor, experts: int) -> Routing:
        sorted_M, order = index_TK.reshape(-1).sort(stable=True)
        spans, start = [], 0
        for expert, count in enumerate(torch.bincount(sorted_M, minlength=experts).tolist()):
            if count:
                spans.append((expert, start, start + count))
            start += count
        slots = index_TK.shape[-1]
        return cls(order, order.argsort(), order // slots, sorted_M, slots, spans)
