"""Rademacher projections, drawn when they are needed and kept only while they are small.

A projection's entries come from :mod:`dcr_scale.probe.philox`, keyed by (seed, unit, role, group): the seed, the names
and the number of strips decide them, whatever the device, the world size, or what else is drawn.

With several groups a projection is sparse, in strips: its input is cut into s parts of one width, and each of its
rows reads one of them. Every entry of the input is still read by as many rows as any other, p/s of them, so inner
products are as unbiased, and for parts of like norm their variance is the dense projection's, for any s (Kane, Nelson,
"Sparser Johnson-Lindenstrauss transforms", JACM 2014). It takes 1/s of the arithmetic: up to :data:`_MOST_STRIPS`
groups cost one group's product.

The first groups, and the first rows of each, of a larger projection are a smaller one where both have as many strips.
Otherwise the same signs stand in other rows, and the two have nothing in common but their law: at rank 16 and an even
width, 2 groups are not the first 2 of 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcr_scale.probe.philox import derive_key, signs

# Parts of an input are of like norm only while they are wide and few.
_MOST_STRIPS = 8


class Projections:
    """The signs of every unit's two projections: ``rank`` numbers a group, ``groups`` independent groups.

    ``cache_bytes``: matrices are kept until they take so much, half of it as they are used, half at one byte an entry;
    beyond it they are drawn again at each use. At 70 billion parameters, rank 32 and 4 groups all of them are 0.4
    billion entries.

    Shape suffixes: M rows, D width, p rank, s strips, U units, G groups, c = p / s rows of a group that read one strip.
    """

    def __init__(self, seed: int, rank: int, groups: int, *, cache_bytes: int = 256 * 2**20):
        self.seed, self.rank, self.groups = seed, rank, groups
        self._free, self._as_bytes_below = cache_bytes, cache_bytes // 2
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def strips(self, width: int) -> int:
        """Parts that an input of ``width`` is cut into: no more than there are groups, so that the products' matrices
        do not get narrower than ``rank``, which would cost what the strips save."""
        return math.gcd(_MOST_STRIPS, self.groups, self.rank, width)

    def project(self, name: str, role: str, x_MD: Tensor, start: int = 0) -> Tensor:
        """[p, G, M]: row i of a group's projection reads strip i mod s, and stands there in place i div s.

        ``start``: the column of the projection that ``x_MD``'s first one meets. Not scaled: an inner product of two
        vectors so projected is ``rank / s`` times an unbiased estimate.
        """
        width = x_MD.shape[1]
        strips = self.strips(width)
        return self._product(self.matrix(name, role, start, start + width, x_MD, strips), strips, x_MD)[:, 0]

    def project_each(self, names: Sequence[str], role: str, x_MD: Tensor) -> Sequence[Tensor]:
        """The same input by the projections of several units, as :meth:`project` gives them: read once for all."""
        width = x_MD.shape[1]
        strips = self.strips(width)
        if len(names) == 1:
            signs_DW = self.matrix(names[0], role, 0, width, x_MD, strips)
        else:
            signs_DW = self._joined(tuple(names), role, x_MD, strips)
        return self._product(signs_DW, strips, x_MD).unbind(dim=1)

    def _product(self, signs_DW: Tensor, strips: int, x_MD: Tensor) -> Tensor:
        """[p, U, G, M]: a prompt's tokens are a run, and the runs of all groups' prompts lie one stride apart, so that
        their outer products are one batched product of what stands here."""
        part = x_MD.shape[1] // strips
        parts_sdM = x_MD.view(-1, strips, part).permute(1, 2, 0)
        projected_sWM = torch.bmm(signs_DW.view(strips, part, -1).mT, parts_sdM)
        return projected_sWM.view(self.rank, -1, self.groups, len(x_MD))

    def columns(self, name: str, role: str, columns: Tensor, strips: int = 1) -> Tensor:
        """int8 [m, G, c]: the signs that stand in columns ``columns`` (int64 [m]) of one projection."""
        keys = [derive_key(self.seed, name, role, group) for group in range(self.groups)]
        return signs(keys, columns, self.rank // strips)

    def matrix(self, name: str, role: str, start: int, stop: int, like: Tensor, strips: int = 1) -> Tensor:
        """The signs in columns [start, stop), as a [stop − start, c · G] matrix of ``like``'s dtype and device."""
        key = (name, role, start, stop, strips, like.device, like.dtype)
        kept = self._kept.get(key)
        if kept is None:
            columns = torch.arange(start, stop, device=like.device)
            signs_DGc = self.columns(name, role, columns, strips)
            kept = self._keep(key, signs_DGc.mT.flatten(1), like.dtype)
        return kept if kept.dtype == like.dtype else kept.to(like.dtype)

    def _joined(self, names: tuple[str, ...], role: str, like: Tensor, strips: int) -> Tensor:
        """Several units' matrices beside each other, kept in the place of the single ones."""
        width, key = like.shape[1], (names, role, strips, like.device, like.dtype)
        kept = self._kept.get(key)
        if kept is None:
            each = [self.matrix(name, role, 0, width, like, strips).view(width, -1, self.groups) for name in names]
            joined = torch.stack(each, dim=2).flatten(1)  # [D, c · U · G]
            for name in names:
                single = self._kept.pop((name, role, 0, width, strips, like.device, like.dtype), None)
                self._free += 0 if single is None else single.nbytes
            kept = self._keep(key, joined, like.dtype)
        return kept if kept.dtype == like.dtype else kept.to(like.dtype)

    def _keep(self, key: tuple[Any, ...], signs_DW: Tensor, dtype: torch.dtype) -> Tensor:
        used = signs_DW.to(dtype)
        kept = used if self._free - used.nbytes >= self._as_bytes_below else signs_DW.to(torch.int8)
        if kept.nbytes > self._free:
            return used
        self._free -= kept.nbytes
        self._kept[key] = kept
        return kept
