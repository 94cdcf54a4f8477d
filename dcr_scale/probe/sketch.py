"""Gradients into sketches: two-sided Rademacher projections of every unit's gradient.

A gradient G [rows, columns] becomes S = P_out G P_inᵀ, rank × rank numbers a group. With entries ±1,
E ⟨S, S'⟩ = rank² ⟨G, G'⟩, and the sketch is divided by the rank so that the inner product itself is unbiased. A
product's gradient Σ_t δ_t a_tᵀ is projected token by token, (P_out δ_t)(P_in a_t)ᵀ, and never formed. With several
groups, a vector that is no longer than a sketch is its own sketch.

What is left to do after the projections is small and alike for many units, so it waits until some have come together.

Shape suffixes: I items, B rows of the micro-batch, L their longest, N = U · G · B, M rows of a product, U units,
G groups, p rank, W = G · p, S = p² (a sketch), R output probes, m × n a vector folded into a matrix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dcr_kernels import segment_outer
from dcr_scale.probe.capture import Sink
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.units import Inventory, Unit

# What waits is added up when it takes so much.
_WAITING_BYTES = 8 * 2**20
# Of parts as small as this a call costs more than the copy that puts many units' into one.
_SMALL_BYTES = 32 * 2**10


class SketchSink(Sink):
    """Collects this rank's sketches.

    Attributes:
        slices: for each slice, float32 [items, G, C], the coordinates of all its units: parts of one tensor.
        meets: where the head is the embedding, float32 [items, R, D]: Σ_t u_r[token t] δ_t, what the other use of the
            matrix meets; else None.
        rows: which items the current backward pass's rows are: those that follow the one before.
    """

    def __init__(self, inventory: Inventory, projections: Projections, head: Head, items: int):
        self.projections, self._head = projections, head
        units = sorted(inventory.units, key=lambda unit: unit.slice)  # stable: within a slice in the inventory's order
        self._place = {unit.name: place for place, unit in enumerate(units)}
        widths = [0] * inventory.slices
        for unit in units:
            widths[unit.slice] += projections.rank**2
        # One block of memory, which the next measurement finds again where many small ones go back to the system.
        everything = torch.zeros(items, projections.groups, sum(widths), device=head.device)
        self._by_unit_IGUS = everything.view(items, projections.groups, len(units), projections.rank**2)
        self.slices = list(everything.split(widths, dim=2))
        self.meets = torch.zeros(items, head.probes, head.width, device=head.device) if head.crosses else None
        self.rows = slice(0, 0)
        # Units and their parts, by what is to be done with them and the parts' shapes and dtypes.
        self._waiting: dict[tuple, list[tuple[Unit, tuple[Tensor, ...]]]] = defaultdict(list)
        self._waiting_bytes = 0

    def begin(self, layout: TokenLayout) -> None:
        self._layout = layout
        self.rows = slice(self.rows.stop, self.rows.stop + len(layout.index))

    def end(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, defaultdict(list), 0
        for (sketch, given, _), alike in waiting.items():
            units, parts = zip(*alike, strict=True)
            sketch(units, *(torch.stack(each) for each in zip(*parts, strict=True)), **dict(given))

    def _wait(self, sketch: Callable[..., None], unit: Unit, *parts: Tensor, **given: int) -> None:
        """Have ``sketch`` called later, once for all units of which the same is ``given`` and whose parts have the same
        shapes and dtypes; it gets the parts stacked, [U, …]."""
        shapes = tuple((x.shape, x.dtype) for x in parts)
        self._waiting[sketch, tuple(given.items()), shapes].append((unit, parts))
        self._waiting_bytes += sum(x.nbytes for x in parts)
        if self._waiting_bytes > _WAITING_BYTES:
            self.end()

    def enter(self, units: Sequence[Unit], inputs_MD: Tensor, routing: Routing | None) -> list[Tensor]:
        columns = units[0].shape[1]
        draw = self.projections
        weights = [unit.name for unit in units if unit.weight]
        by_weight = iter(draw.project_each(weights, "in", inputs_MD) if weights else ())
        entered = []
        for unit in units:
            projected = next(by_weight) if unit.weight else inputs_MD.new_zeros(draw.rank, draw.groups, len(inputs_MD))
            if unit.bias:
                # The bias is one more column of the weight, and its input is 1. All rows read it, where a strip's rows
                # are one in s: it weighs 1/√s of an entry of theirs.
                strips = draw.strips(columns)
                last_1W = draw.matrix(unit.name, "in", columns, columns + 1, inputs_MD)
                signs_pG1 = last_1W.view(-1, strips, draw.groups).transpose(0, 1).reshape(draw.rank, -1, 1)
                projected = projected + signs_pG1 * strips**-0.5
            entered.append(projected)
        return entered

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> Tensor:
        project = self.projections.project
        if routing is None:
            delta = project(unit.name, "out", delta_MD)
        else:
            width = delta_MD.shape[1]
            each = [
                project(unit.name, "out", delta_MD[start:stop], expert * width) for expert, start, stop in routing.spans
            ]
            delta, kept = torch.cat(each, dim=-1)[..., routing.inverse], kept[..., routing.inverse]
        strips = self.projections.strips
        self._outer(unit, delta, kept, strips(delta_MD.shape[1]) * strips(unit.shape[1]))
        return delta

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        met, which = ids_T.unique(return_inverse=True)
        signs_TGp = self.projections.columns(unit.name, "in", met)[which].to(delta_TD.dtype)
        delta = self.projections.project(unit.name, "out", delta_TD)
        self._outer(unit, delta, signs_TGp.permute(2, 1, 0), self.projections.strips(delta_TD.shape[1]))
        if self.meets is not None and unit.parameter is self._head.weight:
            rows = self._layout.rows
            delta_BLD, probes_BLR = rows(delta_TD.float()), rows(self._head.at_tokens(ids_T))
            self.meets[self.rows] += torch.einsum("blr,bld->brd", probes_BLR, delta_BLD)

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        self._wait(self._vectors, unit, gradient_BD)

    def _vectors(self, units: Sequence[Unit], gradient_UBD: Tensor) -> None:
        """Add vectors' gradients: as they are where they fit into a sketch, else folded into matrices
        (:func:`~dcr_scale.probe.units.folded`)."""
        rows, columns = units[0].shape
        groups, rank = self.projections.groups, self.projections.rank
        if groups > 1 and gradient_UBD.shape[-1] <= rank**2:
            # No longer than its sketch, a vector is the sketch: exact, in every group. (The blocks of a single group
            # are parts of it, and one part of a vector stands for no other.)
            whole_UBS = F.pad(gradient_UBD, (0, rank**2 - gradient_UBD.shape[-1]))
            self._add(units, whole_UBS[:, :, None].expand(-1, -1, groups, -1), scale=1.0)
            return
        padded = F.pad(gradient_UBD, (0, rows * columns - gradient_UBD.shape[-1]))
        in_UnW, out_UmW = (
            torch.stack([self.projections.matrix(unit.name, role, 0, size, padded) for unit in units])
            for role, size in (("in", columns), ("out", rows))
        )
        half = (padded.view(len(units), -1, columns) @ in_UnW).view(len(units), -1, rows, rank, groups)
        out_UGpm = out_UmW.view(-1, rows, rank, groups).permute(0, 3, 2, 1)
        self._add(units, (out_UGpm[:, None] @ half.permute(0, 1, 4, 2, 3)).flatten(-2), scale=1 / rank)

    def _outer(self, unit: Unit, delta_pGM: Tensor, inputs_pGM: Tensor, strips: int) -> None:
        """Add Σ over each row's tokens (and slots) of δ aᵀ, group by group. ``strips``: those of both sides,
        multiplied."""
        if self._layout.cu_seqlens is not None and delta_pGM.is_cuda:
            self._wait(self._segments, unit, delta_pGM, inputs_pGM, strips=strips)
        elif delta_pGM.nbytes + inputs_pGM.nbytes <= _SMALL_BYTES:
            self._wait(self._rows, unit, delta_pGM, inputs_pGM, strips=strips)
        else:
            self._rows([unit], delta_pGM[None], inputs_pGM[None], strips)

    def _rows(self, units: Sequence[Unit], delta_UpGM: Tensor, inputs_UpGM: Tensor, strips: int) -> None:
        """:meth:`_outer` of several units as one batched product; of a single one without a copy."""
        groups, rank = self.projections.groups, self.projections.rank
        left_NpL, right_NpL = (
            self._layout.split(x.float()).permute(0, 2, 3, 1, 4).flatten(0, 2) for x in (delta_UpGM, inputs_UpGM)
        )
        outer_UGBS = torch.bmm(left_NpL, right_NpL.mT).view(len(units), groups, -1, rank**2)
        self._add(units, outer_UGBS.transpose(1, 2), scale=strips**0.5 / rank)

    def _segments(self, units: Sequence[Unit], delta_UpGM: Tensor, inputs_UpGM: Tensor, strips: int) -> None:
        """:meth:`_outer` of several units where rows follow one another: their groups are further segments, and one
        launch does them all."""
        layout, groups, rank = self._layout, self.projections.groups, self.projections.rank
        assert layout.cu_seqlens is not None
        rows = delta_UpGM.shape[-1]
        ends = layout.cu_seqlens * (rows // layout.tokens)
        shift = torch.arange(len(units) * groups, device=ends.device, dtype=ends.dtype)[:, None] * rows
        bounds = torch.cat([ends[:1], (ends[1:] + shift).flatten()])
        left, right = (x.permute(0, 2, 3, 1).reshape(-1, rank) for x in (delta_UpGM, inputs_UpGM))
        outer_UGBS = segment_outer(left, right, bounds).view(len(units), groups, -1, rank**2)
        self._add(units, outer_UGBS.transpose(1, 2)[:, : len(layout.index)], scale=strips**0.5 / rank)

    def _add(self, units: Sequence[Unit], sketch_UBGS: Tensor, scale: float) -> None:
        places_U = torch.tensor([self._place[unit.name] for unit in units], device=sketch_UBGS.device)
        into_BGUS = self._by_unit_IGUS[self.rows]
        into_BGUS.index_add_(2, places_U, sketch_UBGS.permute(1, 2, 0, 3).to(into_BGUS.dtype), alpha=scale)
