"""Gradients into sketches: two-sided Rademacher projections of every unit's gradient.

A gradient G [rows, columns] becomes S = P_out G P_inᵀ, rank × rank numbers a group. With entries ±1,
E ⟨S, S'⟩ = rank² ⟨G, G'⟩, and the sketch is divided by the rank so that the inner product itself is unbiased. A
product's gradient Σ_t δ_t a_tᵀ is projected token by token, (P_out δ_t)(P_in a_t)ᵀ, and never formed.

What is left to do after the projections is small and alike for many units, so it waits until some have come together.

Shape suffixes: B rows of the micro-batch, L their longest, M rows of a product, U units, s strips, c = p / s, G groups,
p rank, W = G · p.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcr_kernels import segment_outer
from dcr_scale.probe.capture import Sink
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.units import Inventory, Unit

# Projections and gradients that wait are added up when they take so much.
_WAITING_BYTES = 8 * 2**20


class SketchSink(Sink):
    """Collects this rank's sketches.

    Attributes:
        slices: for each slice, float32 [items, G, C], the coordinates of all its units.
        meets: where the head is the embedding, float32 [items, R, D]: Σ_t u_r[token t] δ_t, what the other use of the
            matrix meets; else None.
        rows: which items the current backward pass's rows are: those that follow the one before.
    """

    def __init__(self, inventory: Inventory, projections: Projections, head: Head, items: int):
        self.projections, self._head = projections, head
        self._offset: dict[str, int] = {}
        widths = [0] * inventory.slices
        for unit in inventory.units:
            self._offset[unit.name] = widths[unit.slice]
            widths[unit.slice] += projections.rank**2
        self.slices = [torch.zeros(items, projections.groups, width, device=head.device) for width in widths]
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
        for (sketch, _), alike in waiting.items():
            units, parts = zip(*alike, strict=True)
            sketch(units, *(torch.stack(each) for each in zip(*parts, strict=True)))

    def _wait(self, sketch: Callable[..., None], unit: Unit, *parts: Tensor) -> None:
        """``sketch`` is called with this unit and others that have parts of the same shapes, and all parts [U, …]."""
        shapes = tuple((x.shape, x.dtype) for x in parts)
        self._waiting[sketch, shapes].append((unit, parts))
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
            if unit.weight:
                projected = next(by_weight)
            else:
                strips = draw.strips(columns)
                projected = inputs_MD.new_zeros(strips, draw.groups, draw.rank // strips, len(inputs_MD))
            if unit.bias:
                # The bias is one more column of the weight, and its input is 1. All rows read it, where a strip's rows
                # are one in s: it weighs 1/√s of an entry of theirs.
                strips = len(projected)
                last_1W = draw.matrix(unit.name, "in", columns, columns + 1, inputs_MD)
                signs_sGc1 = last_1W.view(draw.groups, -1, strips).movedim(2, 0)[..., None]
                projected = projected + signs_sGc1 * strips**-0.5
            entered.append(projected)
        return entered

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> None:
        project = self.projections.project
        if routing is None:
            delta = project(unit.name, "out", delta_MD)
        else:
            width = delta_MD.shape[1]
            each = [
                project(unit.name, "out", delta_MD[start:stop], expert * width) for expert, start, stop in routing.spans
            ]
            delta, kept = torch.cat(each, dim=-1)[..., routing.inverse], kept[..., routing.inverse]
        self._wait(self._outer, unit, delta, kept)

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        met, which = ids_T.unique(return_inverse=True)
        tokens = self.projections.columns(unit.name, "in", met)[which].movedim(0, -1)[None].to(delta_TD.dtype)
        self._wait(self._outer, unit, self.projections.project(unit.name, "out", delta_TD), tokens)
        if self.meets is not None and unit.parameter is self._head.weight:
            rows = self._layout.rows
            delta_BLD, probes_BLR = rows(delta_TD.float()), rows(self._head.at_tokens(ids_T))
            self.meets[self.rows] += torch.einsum("blr,bld->brd", probes_BLR, delta_BLD)

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        self._wait(self._folded, unit, gradient_BD)

    def _folded(self, units: Sequence[Unit], gradient_UBD: Tensor) -> None:
        """Add vectors' gradients, each folded into a matrix (see :func:`~dcr_scale.probe.units.folded`)."""
        rows, columns = units[0].shape
        groups, rank = self.projections.groups, self.projections.rank
        missing = rows * columns - gradient_UBD.shape[-1]
        padded = torch.nn.functional.pad(gradient_UBD, (0, missing)) if missing else gradient_UBD
        in_UcW, out_UrW = (
            torch.stack([self.projections.matrix(unit.name, role, 0, size, padded) for unit in units])
            for role, size in (("in", columns), ("out", rows))
        )
        half = (padded.view(len(units), -1, columns) @ in_UcW).view(len(units), -1, rows, groups, rank)
        out_UGpr = out_UrW.view(-1, rows, groups, rank).permute(0, 2, 3, 1)
        self._add(units, out_UGpr[:, None] @ half.transpose(2, 3))

    def _outer(self, units: Sequence[Unit], delta: Tensor, inputs: Tensor) -> None:
        """Add Σ over each row's tokens (and slots) of δ aᵀ, group by group; both sides are [U, s, G, c, M]."""
        layout, groups, rank = self._layout, self.projections.groups, self.projections.rank
        strips = delta.shape[1] * inputs.shape[1]
        # Rows take turns among the strips, so that the first ones of a projection are those of a smaller rank.
        if layout.cu_seqlens is not None and delta.is_cuda:
            # Groups and units as further segments: one launch for all of them.
            rows = delta.shape[-1]
            ends = layout.cu_seqlens * (rows // layout.tokens)
            shift = torch.arange(len(units) * groups, device=ends.device, dtype=ends.dtype)[:, None] * rows
            bounds = torch.cat([ends[:1], (ends[1:] + shift).flatten()])
            flat = [x.permute(0, 2, 4, 3, 1).reshape(-1, rank) for x in (delta, inputs)]
            outer = segment_outer(flat[0], flat[1], bounds).view(len(units), groups, -1, rank, rank)
            outer_UBGpp = outer.transpose(1, 2)[:, : len(layout.index)]
        else:
            # Units and groups as further rows. Neither einsum nor a broadcast matmul: they cost more than the products.
            split_BUsGcL = [layout.split(x.float()) for x in (delta, inputs)]
            left, right = (x.permute(1, 0, 3, 4, 2, 5).reshape(-1, rank, x.shape[-1]) for x in split_BUsGcL)
            outer_UBGpp = torch.bmm(left, right.mT).view(len(units), -1, groups, rank, rank)
        self._add(units, outer_UBGpp, strips)

    def _add(self, units: Sequence[Unit], sketch_UBGpp: Tensor, strips: int = 1) -> None:
        """``strips``: those of both sides, multiplied."""
        scale = strips**0.5 / self.projections.rank
        for unit, sketch_BGpp in zip(units, sketch_UBGpp, strict=True):
            start, size = self._offset[unit.name], self.projections.rank**2
            place = self.slices[unit.slice][self.rows, :, start : start + size]
            place.add_(sketch_BGpp.flatten(2), alpha=scale)
