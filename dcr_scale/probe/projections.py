"""Rademacher projections, drawn when they are needed and kept only while they are small.

A projection's entries come from :mod:`dcr_scale.probe.philox`, keyed by (seed, unit, role, group): the seed and the
names decide them, whatever the device, the world size, or what else is drawn.

With several groups a projection is sparse, in strips: its input is cut into s parts of one width, and each of its
rows reads one of them. Every entry of the input is still read by as many rows as any other, p/s of them, so inner
products are as unbiased, and for parts of like norm their variance is the dense projection's, for any s (Kane, Nelson,
"Sparser Johnson-Lindenstrauss transforms", JACM 2014). It takes 1/s of the arithmetic: up to :data:`_MOST_STRIPS`
groups cost one group's product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcr_scale.probe.philox import derive_key, signs

# Parts of an input are of like norm only while they are wide and few.
_MOST_STRIPS = 8


class Projections:
    """The signs of every unit's two projections: ``rank`` numbers a group, ``groups`` independent groups.

    ``cache_bytes``: matrices are kept, one byte an entry, until they take so much; beyond it they are drawn again at
    each use. At 70 billion parameters, rank 32 and 4 groups all of them are 0.4 billion entries.

    Shape suffixes: M rows, D width, s strips, G groups, c = rank / s rows of a group that read one strip.
    """

    def __init__(self, seed: int, rank: int, groups: int, *, cache_bytes: int = 256 * 2**20):
        self.seed, self.rank, self.groups = seed, rank, groups
        self._free = cache_bytes
        self._kept: dict[tuple[str, str, int, int, int, torch.device], Tensor] = {}

    def strips(self, width: int) -> int:
        """Parts that an input of ``width`` is cut into: no more than there are groups, so that the products' matrices
        do not get narrower than ``rank``, which would cost what the strips save."""
        return math.gcd(_MOST_STRIPS, self.groups, self.rank, width)

    def project(self, name: str, role: str, x_MD: Tensor, start: int = 0) -> Tensor:
        """[M, s, G, c]: row i of a group's projection stands at strip i mod s, place i div s.

        ``start``: the column of the projection that ``x_MD``'s first one meets. Not scaled: an inner product of two
        vectors so projected is ``rank / s`` times an unbiased estimate.
        """
        width = x_MD.shape[1]
        strips = self.strips(width)
        signs_DW = self.matrix(name, role, start, start + width, x_MD, strips)
        parts_sdM = x_MD.view(len(x_MD), strips, -1).permute(1, 2, 0)
        projected_sWM = torch.bmm(signs_DW.view(strips, -1, signs_DW.shape[1]).mT, parts_sdM)
        # Tokens last in memory: the outer products sum over them, and arranging long runs is cheap.
        return projected_sWM.unflatten(1, (self.groups, -1)).permute(3, 0, 1, 2)

    def columns(self, name: str, role: str, columns: Tensor, strips: int = 1) -> Tensor:
        """int8 [m, G, c]: the signs that stand in columns ``columns`` (int64 [m]) of one projection."""
        keys = [derive_key(self.seed, name, role, group) for group in range(self.groups)]
        return signs(keys, columns, self.rank // strips)

    def matrix(self, name: str, role: str, start: int, stop: int, like: Tensor, strips: int = 1) -> Tensor:
        """The signs in columns [start, stop), as a [stop − start, G · c] matrix of ``like``'s dtype and device."""
        key = (name, role, start, stop, strips, like.device)
        kept = self._kept.get(key)
        if kept is None:
            kept = self.columns(name, role, torch.arange(start, stop, device=like.device), strips).flatten(1)
            if kept.numel() <= self._free:
                self._free -= kept.numel()
                self._kept[key] = kept
        return kept.to(like.dtype)
