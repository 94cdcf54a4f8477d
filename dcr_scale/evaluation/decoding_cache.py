"""Keys and values of a batch that is being answered: buffers with room for every token to come.

transformers' DynamicCache copies a batch's whole past at each token; these write the new token beside it. Rows that
have finished can leave, and a beginning that all prompts share is computed once.

Shape suffixes: N rows, G key-value heads, S slots (tokens that there is room for), D head width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, of which ``filled`` slots are in use."""

    def __init__(self, slots: int):
        super().__init__()
        self.slots, self.filled = slots, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_room(states, len(states), self.slots) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *unused: Any, **ignored: Any) -> tuple[Tensor, Tensor]:
        """Append [N, G, t, D] each; returns all that is filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled

    def repeated(self, rows: int, slots: int) -> RoomyLayer:
        """This layer of one row as one of many rows, with more room."""
        layer = RoomyLayer(slots)
        layer.dtype, layer.device, layer.is_initialized, layer.filled = self.dtype, self.device, True, self.filled
        layer.keys, layer.values = _room(self.keys, rows, slots), _room(self.values, rows, slots)
        layer.keys[:, :, : self.filled] = self.keys[:, :, : self.filled]
        layer.values[:, :, : self.filled] = self.values[:, :, : self.filled]
        return layer

    def keep(self, rows: Tensor) -> None:
        """Let go of all rows but these (int64 indices)."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def empty(slots: int) -> Cache:
    """A cache with room for so many tokens a row; the first pass tells it the number of rows."""
    return Cache(layer_class_to_replicate=partial(RoomyLayer, slots))


def repeated(beginning: Cache, rows: int, slots: int) -> Cache:
    """Every row begins with what ``beginning`` holds of its one row."""
    return Cache(layers=[layer.repeated(rows, slots) for layer in beginning.layers])


def keep(cache: Cache, rows: Tensor) -> None:
    """Let go of all rows of a batch but these."""
    for layer in cache.layers:
        layer.keep(rows)


def _room(like_NGtD: Tensor, rows: int, slots: int) -> Tensor:
    """Undefined [rows, G, S, D]."""
    _, heads, _, width = like_NGtD.shape
    return torch.empty(rows, heads, slots, width, dtype=like_NGtD.dtype, device=like_NGtD.device)
