"""Gradients into sketches: two-sided Rademacher projections of every unit's gradient.

A gradient G [rows, columns] becomes S = P_out G P_inᵀ, rank × rank numbers a group. With entries ±1,
E ⟨S, S'⟩ = rank² ⟨G, G'⟩, and the sketch is divided by the rank so that the inner product itself is unbiased. A
product's gradient Σ_t δ_t a_tᵀ is projected token by token, (P_out δ_t)(P_in a_t)ᵀ, and never formed.

Shape suffixes: B rows of the micro-batch, L their longest, M rows of a product, G groups, p rank, W = G · p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcr_kernels import segment_outer
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.projections import Projections
from dcr_scale.probe.units import Inventory, Unit


class SketchSink:
    """Collects this rank's sketches.

    Attributes:
        slices: for each slice, float32 [items, G, C], the coordinates of all its units.
        meets: where the head is the embedding, float32 [items, R, D]: Σ_t u_r[token t] δ_t, what the other use of the
            matrix meets; else None.
        rows: which items the current micro-batch's rows are; the caller sets it.
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

    def enter(self, unit: Unit, inputs_MD: Tensor, routing: Routing | None) -> Tensor:
        columns = unit.shape[1]
        if unit.weight:
            projected_MW = inputs_MD @ self.projections.matrix(unit.name, "in", 0, columns, inputs_MD)
        else:
            projected_MW = inputs_MD.new_zeros(len(inputs_MD), self.projections.width)
        if unit.bias:
            # The bias is one more column of the weight, and its input is 1.
            projected_MW = projected_MW + self.projections.matrix(unit.name, "in", columns, columns + 1, inputs_MD)
        return projected_MW

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None, layout: TokenLayout) -> None:
        draw = self.projections.matrix
        if routing is None:
            delta_MW = delta_MD @ draw(unit.name, "out", 0, unit.shape[0], delta_MD)
        else:
            width = delta_MD.shape[1]
            delta_MW = torch.cat(
                [
                    delta_MD[start:stop] @ draw(unit.name, "out", expert * width, (expert + 1) * width, delta_MD)
                    for expert, start, stop in routing.spans
                ]
            )
            delta_MW, kept = delta_MW[routing.inverse], kept[routing.inverse]
        self._add(unit, self._outer(delta_MW, kept, layout))

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor, layout: TokenLayout) -> None:
        met, which = ids_T.unique(return_inverse=True)
        token_TW = self.projections.columns(unit.name, "in", met)[which].to(delta_TD.dtype)
        delta_TW = delta_TD @ self.projections.matrix(unit.name, "out", 0, unit.shape[0], delta_TD)
        self._add(unit, self._outer(delta_TW, token_TW, layout))
        if self.meets is not None and unit.parameter is self._head.weight:
            delta_BLD, probes_BLR = layout.rows(delta_TD.float()), layout.rows(self._head.at_tokens(ids_T))
            self.meets[self.rows] += torch.einsum("blr,bld->brd", probes_BLR, delta_BLD)

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        rows, columns = unit.shape
        padded = torch.nn.functional.pad(gradient_BD, (0, rows * columns - gradient_BD.shape[1]))
        in_cW = self.projections.matrix(unit.name, "in", 0, columns, padded)
        out_rW = self.projections.matrix(unit.name, "out", 0, rows, padded)
        groups, rank = self.projections.groups, self.projections.rank
        half = (padded.view(-1, rows, columns) @ in_cW).view(-1, rows, groups, rank)
        self._add(unit, out_rW.view(rows, groups, rank).permute(1, 2, 0) @ half.permute(0, 2, 1, 3))

    def _outer(self, delta_MW: Tensor, input_MW: Tensor, layout: TokenLayout) -> Tensor:
        """Σ over each row's tokens (and slots) of δ aᵀ, group by group: float32 [B, G, p, p]."""
        groups, rank = self.projections.groups, self.projections.rank
        slots = len(delta_MW) // layout.tokens
        if layout.cu_seqlens is not None and delta_MW.is_cuda:
            # Groups as further segments: one launch for all of them.
            ends = layout.cu_seqlens * slots
            shift = torch.arange(groups, device=ends.device, dtype=ends.dtype)[:, None] * len(delta_MW)
            bounds = torch.cat([ends[:1], (ends[1:] + shift).flatten()])
            flat = [x.view(-1, groups, rank).transpose(0, 1).reshape(-1, rank) for x in (delta_MW, input_MW)]
            outer_GNpp = segment_outer(flat[0], flat[1], bounds).view(groups, -1, rank, rank)
            return outer_GNpp.transpose(0, 1)[: len(layout.index)]
        sides = (
            layout.rows(x.view(layout.tokens, slots * x.shape[1])).view(len(layout.index), -1, groups, rank)
            for x in (delta_MW.float(), input_MW.float())
        )
        # Groups as further rows. Neither einsum nor a broadcast matmul, which cost more than these small products.
        delta, kept = (side.transpose(1, 2).reshape(-1, side.shape[1], rank) for side in sides)
        return torch.bmm(delta.mT, kept).view(-1, groups, rank, rank)

    def _add(self, unit: Unit, sketch_BGpp: Tensor) -> None:
        start, size = self._offset[unit.name], self.projections.rank**2
        place = self.slices[unit.slice][self.rows, :, start : start + size]
        place.add_(sketch_BGpp.flatten(2), alpha=1 / self.projections.rank)
