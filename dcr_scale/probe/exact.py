"""The kernel itself: no sketches, no probes. For small models, tests and spot checks.

Every direction of the final hidden state is a cotangent of its own, so a prompt takes D rows of passes. Inner products
of gradients come from what they are made of (*ghost* products): for a linear, Σ_t Σ_s (δ_t·δ_s)(a_t·a_s).
Everything is kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from dcr_scale.probe.agreement import agree
from dcr_scale.probe.capture import Capture, Sink
from dcr_scale.probe.estimator import Estimate
from dcr_scale.probe.head import Head, gathered
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.reduction import world_size
from dcr_scale.probe.units import Unit, shape_of

# Rows of the head taken at once, so that no V × V matrix is ever held.
_HEAD_ROWS = 512


@dataclass
class Factors:
    """What a prompt's gradients are made of, by unit name. Where a weight is used again, its uses are further tokens.

    ``inputs``: [T, columns] of a product; ``experts``: the expert of each row; ``deltas``: [D, T, rows], one for each
    direction of the hidden state. Of a lookup, ``tokens`` [T] stand for the inputs. ``vectors``: [D, length].
    ``hidden``: [D], the final hidden state, known after the pass.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor = field(init=False)


class GhostSink(Sink):
    """Collects one prompt's factors; its copies are the rows of one micro-batch, one for each direction."""

    def __init__(self) -> None:
        self.factors = Factors()

    def begin(self, layout: TokenLayout) -> None:
        self._layout = layout

    def enter(self, units: Sequence[Unit], inputs_MD: Tensor, routing: Routing | None) -> list[Tensor]:
        inputs_MD = inputs_MD.double()
        return [self._counted(unit, inputs_MD) for unit in units]

    @staticmethod
    def _counted(unit: Unit, inputs_MD: Tensor) -> Tensor:
        if not unit.weight:
            inputs_MD = inputs_MD[:, :0]
        return torch.cat([inputs_MD, inputs_MD.new_ones(len(inputs_MD), 1)], dim=1) if unit.bias else inputs_MD

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> Tensor:
        layout = self._layout
        if routing is not None:
            kept, delta_MD = kept[routing.inverse], delta_MD[routing.inverse]
            experts = routing.experts[routing.inverse].view(layout.tokens, -1)
            self._append(self.factors.experts, unit, layout.rows(experts)[0].flatten())
        self._keep(unit, delta_MD)
        # Every copy of the prompt has the same inputs.
        self._append(self.factors.inputs, unit, self._rows(kept)[0])
        return delta_MD

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        self._keep(unit, delta_TD)
        self._append(self.factors.tokens, unit, self._layout.rows(ids_T)[0])

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        self.factors.vectors[unit.name] = self.factors.vectors.get(unit.name, 0) + gradient_BD.double()

    def _keep(self, unit: Unit, delta_MD: Tensor) -> None:
        self._append(self.factors.deltas, unit, self._rows(delta_MD.double()), dim=1)

    @staticmethod
    def _append(kept: dict[str, Tensor], unit: Unit, tokens: Tensor, dim: int = 0) -> None:
        kept[unit.name] = torch.cat([kept[unit.name], tokens], dim) if unit.name in kept else tokens

    def _rows(self, flat_MD: Tensor) -> Tensor:
        """[B, L · slots, D]."""
        layout = self._layout
        per_token = flat_MD.reshape(layout.tokens, -1)
        return layout.rows(per_token).reshape(len(layout.index), -1, flat_MD.shape[1])


def exact_kernel(
    capture: Capture,
    head: Head,
    run: Callable[[Sink, Sequence[Sequence[int]], Head, Tensor], Tensor],
    sequences: Sequence[tuple[int, ...]],
) -> Callable[[Tensor, Tensor, bool], Estimate]:
    """Exact ‖K‖²_F, with no error, for any pairs of ``sequences``. Every rank computes all of it.

    ``run``: one micro-batch of prompts through ``capture``, with its cotangents; gives the final hidden states.
    Raises ValueError on all ranks alike for what went wrong in the passes, and before them where the factors would not
    fit into memory.
    """
    agree(_why_too_large(capture, head, sum(map(len, sequences))))
    directions = torch.eye(head.width, device=head.device)
    factors = []
    for sequence in sequences:
        sink = GhostSink()
        sink.factors.hidden = run(sink, [sequence] * head.width, head, directions)[0].double()
        factors.append(sink.factors)
    agree(capture.failure)
    with torch.no_grad(), gathered(head.weight):
        weight_VD = head.weight.detach().double().clone()

    def pairs(left: Tensor, right: Tensor, paired: bool) -> Estimate:
        columns = [[j] for j in right.tolist()] if paired else [right.tolist()] * len(left)
        found = [
            [_compare(capture, head, weight_VD, factors[i], factors[j]) for j in row]
            for i, row in zip(left.tolist(), columns, strict=True)
        ]
        squared = torch.stack([torch.stack([square for square, _ in row]) for row in found])
        by_layer = torch.stack([torch.stack([layers for _, layers in row], dim=-1) for row in found], dim=1)
        return Estimate(squared, squared.clone(), squared.new_zeros(0, *squared.shape), by_layer)

    return pairs


def _why_too_large(capture: Capture, head: Head, tokens: int) -> str | None:
    """Says so where what all prompts' gradients are made of is more than the memory that is free here."""
    # Of experts a token meets one at least.
    rows = sum(
        unit.shape[0] // (shape_of(unit.parameter)[0] if unit.kind == "experts" else 1)
        for unit in capture.inventory.units
        if unit.kind in ("linear", "experts")
    )
    needed = torch.float64.itemsize * head.width * tokens * rows
    if head.device.type == "cuda":
        unused = torch.cuda.memory_reserved(head.device) - torch.cuda.memory_allocated(head.device)
        free = torch.cuda.mem_get_info(head.device)[0] + unused
    else:  # every rank keeps them all, and on CPUs they share one machine more often than not
        free = psutil.virtual_memory().available // world_size()
    # Passes and comparisons take as much again, and more.
    if 2 * needed <= free:
        return None
    return (
        f"the exact kernel keeps {needed / 2**30:.3g} GiB for prompts of {tokens} tokens in all, and works on them in "
        f"as much again, and {free / 2**30:.3g} GiB are free: give fewer or shorter prompts, or leave exact out"
    )


def _compare(capture: Capture, head: Head, weight_VD: Tensor, left: Factors, right: Factors) -> tuple[Tensor, Tensor]:
    """‖K‖²_F of one pair, and its parts by layer, [layers]."""
    inventory = capture.inventory
    theta = weight_VD.new_zeros(inventory.slices, head.width, head.width)
    for unit in inventory.units:
        theta[unit.slice] += _ghost(unit.name, left, right)
    c = (left.hidden @ right.hidden) * float(head.counts) + float(head.bias_counts)
    first = second = None
    if head.crosses:
        name = next(unit.name for unit in inventory.units if unit.parameter is head.weight)
        # X = Σ_t e_{token t} (W F_t h)ᵀ with F_t the Jacobian of the hidden state by the embedding of token t.
        first = right.tokens[name], (right.deltas[name] @ left.hidden).T @ weight_VD.T
        second = left.tokens[name], (left.deltas[name] @ right.hidden).T @ weight_VD.T
    squared = weight_VD.new_zeros(())
    back_DD = torch.zeros_like(theta[0])
    for start in range(0, head.vocabulary, _HEAD_ROWS):
        rows = slice(start, min(start + _HEAD_ROWS, head.vocabulary))
        kernel_vV = weight_VD[rows] @ theta.sum(dim=0) @ weight_VD.T
        kernel_vV.diagonal(start).add_(c)
        if first is not None and second is not None:
            tokens, values_TV = first
            mine = (tokens >= rows.start) & (tokens < rows.stop)
            kernel_vV.index_add_(0, tokens[mine] - start, values_TV[mine])
            tokens, values_TV = second
            kernel_vV.index_add_(1, tokens, values_TV[:, rows].T)
        squared += kernel_vV.square().sum()
        back_DD += weight_VD[rows].T @ (kernel_vV @ weight_VD)
    # ⟨W Θ_l Wᵀ, K⟩ = ⟨Θ_l, Wᵀ K W⟩.
    return squared, (theta[:-1] * back_DD).sum(dim=(-2, -1))


def _ghost(name: str, left: Factors, right: Factors) -> Tensor:
    """Inner products of two prompts' gradients in one unit, for all pairs of directions: [D, D]."""
    if name in left.vectors:
        return left.vectors[name] @ right.vectors[name].T
    if name in left.tokens:
        meet_TS = (left.tokens[name][:, None] == right.tokens[name][None, :]).double()
    else:
        meet_TS = left.inputs[name] @ right.inputs[name].T
    if name in left.experts:
        meet_TS = meet_TS * (left.experts[name][:, None] == right.experts[name][None, :])
    met = torch.einsum("ts,lso->lto", meet_TS, right.deltas[name])
    return left.deltas[name].flatten(1) @ met.flatten(1).T
