"""Rademacher projections, drawn when they are needed and kept only while they are small.

A projection's entries come from :mod:`dcr_scale.probe.philox`, keyed by (seed, unit, role, group): the seed and the
names decide them, whatever the device, the world size, or what else is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcr_scale.probe.philox import derive_key, signs


class Projections:
    """The signs of every unit's two projections: ``rank`` numbers a group, ``groups`` independent groups.

    ``cache_bytes``: matrices are kept, one byte an entry, until they take so much; beyond it they are drawn again at
    each use. At 70 billion parameters, rank 32 and 4 groups all of them are 1.4 billion entries.
    """

    def __init__(self, seed: int, rank: int, groups: int, *, cache_bytes: int = 256 * 2**20):
        self.seed, self.rank, self.groups = seed, rank, groups
        self._free = cache_bytes
        self._kept: dict[tuple[str, str, int, int, torch.device], Tensor] = {}

    @property
    def width(self) -> int:
        return self.groups * self.rank

    def columns(self, name: str, role: str, columns: Tensor) -> Tensor:
        """int8 [m, groups · rank]: the signs that stand in columns ``columns`` (int64 [m]) of one projection."""
        keys = [derive_key(self.seed, name, role, group) for group in range(self.groups)]
        return signs(keys, columns, self.rank).flatten(1)

    def matrix(self, name: str, role: str, start: int, stop: int, like: Tensor) -> Tensor:
        """The signs in columns [start, stop), as a [stop − start, groups · rank] matrix of ``like``'s dtype and device.

        Not scaled: an inner product of two sketches is ``rank²`` times an unbiased estimate.
        """
        key = (name, role, start, stop, like.device)
        kept = self._kept.get(key)
        if kept is None:
            kept = self.columns(name, role, torch.arange(start, stop, device=like.device))
            if kept.numel() <= self._free:
                self._free -= kept.numel()
                self._kept[key] = kept
        return kept.to(like.dtype)
