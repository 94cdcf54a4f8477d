"""Gradients into sketches: two-sided Rademacher projections of every unit's gradient.

A gradient G [rows, columns] becomes S = P_out G P_inᵀ, rank × rank numbers a group. With entries ±1,
E ⟨S, S'⟩ = rank² ⟨G, G'⟩, and the sketch is divided by the rank so that the inner product itself is unbiased. A
product's gradient Σ_t δ_t a_tᵀ is projected token by token, (P_out δ_t)(P_in a_t)ᵀ, and never formed.

Shape suffixes: B rows of the micro-batch, L their longest, M rows of a product, G groups, p rank, W = G · p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dcr_kernels import segment_outer
from dcr_scale.probe.capture import Sink
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.units import Inventory, Unit


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

    def begin(self, rows: int) -> None:
        self.rows = slice(self.rows.stop, self.rows.stop + rows)

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

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None, layout: TokenLayout) -> None:
        project = self.projections.project
        if routing is None:
            delta = project(unit.name, "out", delta_MD)
        else:
            width = delta_MD.shape[1]
            each = [
                project(unit.name, "out", delta_MD[start:stop], expert * width) for expert, start, stop in routing.spans
            ]
            delta, kept = torch.cat(each, dim=-1)[..., routing.inverse], kept[..., routing.inverse]
        self._outer(unit, delta, kept, layout)

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor, layout: TokenLayout) -> None:
        met, which = ids_T.unique(return_inverse=True)
        tokens = self.projections.columns(unit.name, "in", met)[which].movedim(0, -1)[None].to(delta_TD.dtype)
        self._outer(unit, self.projections.project(unit.name, "out", delta_TD), tokens, layout)
        if self.meets is not None and unit.parameter is self._head.weight:
            delta_BLD, probes_BLR = layout.rows(delta_TD.float()), layout.rows(self._head.at_tokens(ids_T))
            self.meets[self.rows] += torch.einsum("blr,bld->brd", probes_BLR, delta_BLD)

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        rows, columns = unit.shape
        missing = rows * columns - gradient_BD.shape[1]
        padded = torch.nn.functional.pad(gradient_BD, (0, missing)) if missing else gradient_BD
        in_cW = self.projections.matrix(unit.name, "in", 0, columns, padded)
        out_rW = self.projections.matrix(unit.name, "out", 0, rows, padded)
        groups, rank = self.projections.groups, self.projections.rank
        half = (padded.view(-1, rows, columns) @ in_cW).view(-1, rows, groups, rank)
        self._add(unit, out_rW.view(rows, groups, rank).permute(1, 2, 0) @ half.permute(0, 2, 1, 3))

    def _outer(self, unit: Unit, delta: Tensor, inputs: Tensor, layout: TokenLayout) -> None:
        """Add Σ over each row's tokens (and slots) of δ aᵀ, group by group; both sides are [s, G, c, M]."""
        groups, rank = self.projections.groups, self.projections.rank
        # Rows take turns among the strips, so that the first ones of a projection are those of a smaller rank.
        if layout.cu_seqlens is not None and delta.is_cuda:
            # Groups as further segments: one launch for all of them.
            rows = delta.shape[-1]
            ends = layout.cu_seqlens * (rows // layout.tokens)
            shift = torch.arange(groups, device=ends.device, dtype=ends.dtype)[:, None] * rows
            bounds = torch.cat([ends[:1], (ends[1:] + shift).flatten()])
            flat = [x.permute(1, 3, 2, 0).reshape(-1, rank) for x in (delta, inputs)]
            outer_GNpp = segment_outer(flat[0], flat[1], bounds).view(groups, -1, rank, rank)
            outer_BGpp = outer_GNpp.transpose(0, 1)[: len(layout.index)]
        else:
            # Groups as further rows. Neither einsum nor a broadcast matmul, which cost more than these small products.
            split_BsGcL = [layout.split(x.float()) for x in (delta, inputs)]
            left, right = (x.permute(0, 2, 3, 1, 4).reshape(-1, rank, x.shape[-1]) for x in split_BsGcL)
            outer_BGpp = torch.bmm(left, right.mT).view(-1, groups, rank, rank)
        self._add(unit, outer_BGpp, len(delta) * len(inputs))

    def _add(self, unit: Unit, sketch_BGpp: Tensor, strips: int = 1) -> None:
        """``strips``: those of both sides, multiplied."""
        start, size = self._offset[unit.name], self.projections.rank**2
        place = self.slices[unit.slice][self.rows, :, start : start + size]
        place.add_(sketch_BGpp.flatten(2), alpha=strips**0.5 / self.projections.rank)
