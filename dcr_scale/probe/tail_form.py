r"""Q_ℓ of Proposition 1: how the frozen tail turns the similarity of activations at ℓ into kernel.

A tail's weight W_l maps its input a_l to W_l a_l, so with B_l = ∂z/∂(W_l a_l) its part of the kernel of two prompts is
(a_l'·a_l) B_l' B_lᵀ. (One term; over the tokens of both prompts there is a sum of them.) Three things are frozen and
linearised in the proposition:

* the prompt acts through its pooled row h alone: the last token's activation, or one that all its own tokens share;
* above h the tail is affine, a_l(h) = a_l⁰ + A_l (h − h⁰), which is (Ã_l h̃) with h̃ = (1, h). The constant matters: a
  norm does not change with its input's length, so that A_l h alone would vanish;
* B_l does not depend on the prompt.

Then K_tail(x', x) = Σ_l (h̃'ᵀ Ã_lᵀ Ã_l h̃) B_l B_lᵀ, and by the triangle inequality, where the inner products are not
negative, as those of similar prompts,

    ‖K_tail(x', x)‖_F ≤ h̃'ᵀ Q h̃,   Q = Σ_l ω_l Ã_lᵀ Ã_l ⪰ 0,   ω_l = ‖B_l B_lᵀ‖_F,

with equality where one weight lies above h. Left out, and so in the proposition's Δ: the trunk's own weights, the
vectors of norms, tokens other than the pooled ones, and whatever bends. The head is one of the weights: its a_l is the
final hidden state, its B_l the identity, and ω = √V. A bias is one more column of its weight, whose input is 1. Experts
have one ω for all of a layer's, of which those that a token meets are taken to have equal parts.

Both parts are estimated with passes over reference prompts, one pass for each prompt and probe. Gaussian directions u
of the logits give δ_l = B_lᵀ u, and E (δ_l·δ_l')² = ω_l² over pairs of independent ones. Random signs v_l at every
weight's input at once, S = Σ_l √ω_l v_l·a_l, give the gradient g = ∂S/∂h, and q = (S − g·h, g) has E q qᵀ = Q, as the
signs of different weights are independent. What is kept is the list of the q: a low-rank root of Q.

Shape suffixes: B rows of a micro-batch (a reference prompt under one probe each), M rows of a product, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dcr_scale.models.trunk import decoder_layers
from dcr_scale.probe.activations import leak_between
from dcr_scale.probe.agreement import agree
from dcr_scale.probe.capture import Capture, Sink
from dcr_scale.probe.guard import borrowed, check_ready, unnoticed
from dcr_scale.probe.head import Head
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.passes import packed_batch
from dcr_scale.probe.philox import derive_key, signs
from dcr_scale.probe.units import Inventory, Unit, select, shape_of, take_inventory


@dataclass(frozen=True)
class TailForm:
    """Q ⪰ 0 of rank at most M, as the mean of q qᵀ: ``roots`` float64 [M, 1 + D], the constant's entry first."""

    roots: Tensor

    def similarity(self, left_ID: Tensor, right_JD: Tensor) -> Tensor:
        """h̃'ᵀ Q h̃ of pooled rows as they are, not normalised: float64 [I, J]."""
        return self._features(left_ID) @ self._features(right_JD).T / len(self.roots)

    def _features(self, rows_ND: Tensor) -> Tensor:
        return self.roots[:, 0] + rows_ND.double() @ self.roots[:, 1:].T


def estimate_tail_form(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    layer: int,
    *,
    prefix: int,
    pooling: str,
    probes: int,
    seed: int,
    token_limit: int,
) -> TailForm:
    """Estimate Q_ℓ of a causal language model from reference prompts, at least two.

    Every rank of a partitioned model calls it with the same arguments and takes the same passes.

    Args:
        encoded: the reference prompts' token ids; the first ``prefix`` of them are the template's.
        layer: ℓ; its layers from there on are the tail.
        pooling: ``last`` or ``mean`` over a prompt's own tokens.
        probes: directions a prompt, of the logits and of the weights' inputs each.
        token_limit: tokens of a micro-batch, as far as two rows fit.

    Raises ValueError for a model that the probe cannot measure, or in which packed prompts see each other.
    """
    inventory = take_inventory(model, select(model, "all"))
    check_ready(model)
    rows = [list(ids) for _ in range(probes) for ids in encoded]
    size = max(2, token_limit // max(map(len, rows)))
    chunks = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    head = Head(inventory, seed, len(rows))
    text = model.config.get_text_config()
    heads = {text.num_attention_heads, getattr(text, "num_key_value_heads", None)}

    def batch(chunk: range) -> tuple[dict[str, Any], TokenLayout, Pooled]:
        inputs, layout = packed_batch([rows[i] for i in chunk], head.device, heads)
        return inputs, layout, Pooled.of(layout, prefix, pooling)

    sizes = TailSizes(inventory, layer)
    with borrowed(model, True, head.dtype), unnoticed(model, model):
        agree(leak_between(model, encoded))
        capture = Capture(model, inventory)
        with capture.installed():
            for chunk in chunks:
                inputs, layout, sizes.pooled = batch(chunk)
                which = torch.tensor(chunk, device=head.device)
                capture.run(sizes, layout, inputs, head.cotangents(which))
                _raise(capture)
        capture = TailCapture(model, inventory, layer, sizes.roots(), seed)
        with capture.installed():
            roots = []
            for chunk in chunks:
                inputs, layout, pooled = batch(chunk)
                roots.append(capture.roots(inputs, layout, pooled, chunk, head))
                _raise(capture)
    return TailForm(torch.cat(roots).cpu())


@dataclass(frozen=True)
class Pooled:
    """Which tokens of a micro-batch stand for its rows.

    ``row`` int64 [T]: the row of a token; ``share`` float32 [T]: its weight in the row's pooled activation, 0 for
    tokens that do not stand for one. ``rows``: B.
    """

    row: Tensor
    share: Tensor
    rows: int

    @classmethod
    def of(cls, layout: TokenLayout, prefix: int, pooling: str) -> Pooled:
        lengths = layout.inside.sum(dim=1)
        row = torch.zeros(layout.tokens, dtype=torch.long, device=layout.index.device)
        share = torch.zeros(layout.tokens, device=layout.index.device)
        for b, length in enumerate(lengths.tolist()):
            first = length - 1 if pooling == "last" else prefix
            own = layout.index[b, first:length]
            row[own], share[own] = b, 1 / (length - first)
        return cls(row, share, len(lengths))

    def sum(self, values_TD: Tensor) -> Tensor:
        """Per row, the sum over its tokens: [B, ...]."""
        return values_TD.new_zeros(self.rows, *values_TD.shape[1:]).index_add_(0, self.row, values_TD)


class TailSizes(Sink):
    """Collects ω_l = ‖B_l B_lᵀ‖_F of the tail's weights from pairs of rows under independent probes.

    A sink; ``pooled`` is the current micro-batch's, set by the caller.
    """

    pooled: Pooled

    def __init__(self, inventory: Inventory, layer: int):
        self._tail = {unit.name for unit in inventory.units if layer <= unit.slice < inventory.layers}
        self._squares: dict[str, float] = dict.fromkeys(self._tail, 0.0)
        self._pairs: dict[str, int] = dict.fromkeys(self._tail, 0)

    def roots(self) -> dict[str, float]:
        """√ω_l by unit name."""
        return {name: (self._squares[name] / pairs) ** 0.25 for name, pairs in self._pairs.items() if pairs}

    def enter(self, units: Sequence[Unit], inputs_MD: Tensor, routing: Routing | None) -> list[Tensor]:
        return [inputs_MD.sum()] * len(units)

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> Tensor:
        if unit.name not in self._tail:
            return delta_MD
        pooled = self.pooled
        key_M, experts = _keys(pooled, routing, unit)
        inside = pooled.share[_tokens(pooled, routing)] > 0
        keys, position = key_M[inside].unique(return_inverse=True)
        delta_KD = delta_MD.new_zeros(len(keys), delta_MD.shape[1], dtype=torch.float32)
        delta_KD.index_add_(0, position, delta_MD[inside].float())
        # Gradients in different experts are orthogonal.
        met_KK = (delta_KD @ delta_KD.T) * (keys[:, None] % experts == keys[None, :] % experts)
        row_K = keys // experts
        gram_BB = met_KK.new_zeros(pooled.rows, pooled.rows)
        gram_BB.index_put_((row_K[:, None], row_K[None, :]), met_KK, accumulate=True)
        self._squares[unit.name] += float(gram_BB.square().sum() - gram_BB.diagonal().square().sum())
        self._pairs[unit.name] += pooled.rows * (pooled.rows - 1)
        return delta_MD

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        return None

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        return None


class TailCapture(Capture):
    """Passes whose backward begins at the inputs of all the tail's weights, and ends at the activations at ℓ.

    Args:
        weights: √ω_l by unit name.
    """

    def __init__(self, model: PreTrainedModel, inventory: Inventory, layer: int, weights: dict[str, float], seed: int):
        super().__init__(model, inventory)
        self._layer = decoder_layers(model)[layer]
        self._weights, self._seed = weights, seed

    def roots(self, inputs: dict[str, Any], layout: TokenLayout, pooled: Pooled, chunk: range, head: Head) -> Tensor:
        """q of a micro-batch's rows, which are the reference rows ``chunk``: float64 [B, 1 + D]."""
        self._pooled, self._first = pooled, chunk.start
        self._sum_B = torch.zeros(pooled.rows, dtype=torch.float64, device=head.device)
        self._hidden_BD = self._gradient_BD = torch.empty(0)
        weight = head.vocabulary**0.25
        columns = torch.tensor(chunk, device=head.device)
        signs_BD = weight * signs([derive_key(self._seed, "tail", "head")], columns, head.width + 1)[:, 0].float()
        hook = self._layer.register_forward_pre_hook(self._watch, with_kwargs=True)
        try:
            final_BD, _ = self.run(TailSizes(self.inventory, self.inventory.layers), layout, inputs, signs_BD[:, :-1])
        finally:
            hook.remove()
        self._sum_B += (signs_BD[:, :-1] * final_BD).sum(dim=1).double()
        if head.bias_counts:
            self._sum_B += signs_BD[:, -1].double()
        constant_B = self._sum_B - (self._gradient_BD * self._hidden_BD).sum(dim=1)
        return torch.cat([constant_B[:, None], self._gradient_BD], dim=1)

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._backward:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        pooled, width = self._pooled, hidden.shape[-1]
        flat_TD = hidden.detach().reshape(-1, width).double()
        self._hidden_BD = pooled.sum(pooled.share.double()[:, None] * flat_TD)

        def receive(delta: Tensor) -> None:
            # A shift of the pooled row shifts all the tokens it stands for.
            self._gradient_BD = pooled.sum((pooled.share > 0)[:, None] * delta.reshape(-1, width).double())

        hidden.register_hook(receive)

    def _linear(self, unit: Unit, x: Tensor, output: Tensor) -> None:
        super()._linear(unit, x, output)
        self._inject(unit, x, None)

    def _routed(self, unit: Unit, x_MD: Tensor, output_MD: Tensor, routing: Routing) -> None:
        super()._routed(unit, x_MD, output_MD, routing)
        self._inject(unit, x_MD, routing)

    def _inject(self, unit: Unit, x: Tensor, routing: Routing | None) -> None:
        weight = self._weights.get(unit.name)
        if weight is None:
            return
        pooled, width = self._pooled, x.shape[-1]
        key_M, experts = _keys(pooled, routing, unit)
        key_M = key_M + self._first * experts
        keys, position = key_M.unique(return_inverse=True)
        # One column more, for a bias.
        signs_KD = signs([derive_key(self._seed, "tail", unit.name)], keys, width + 1)[:, 0].float()
        # A token's experts are taken to have equal parts in ω.
        slots = 1 if routing is None else routing.slots
        share_M = weight / slots**0.5 * pooled.share[_tokens(pooled, routing)]
        signs_MD = share_M[:, None] * signs_KD[position]
        met_M = (signs_MD[:, :-1] * x.detach().reshape(-1, width)).sum(dim=1)
        if unit.bias:
            met_M = met_M + signs_MD[:, -1]
        self._sum_B.index_add_(0, pooled.row[_tokens(pooled, routing)], met_M.double())
        injected = signs_MD[:, :-1].reshape(x.shape).to(x.dtype)
        x.register_hook(lambda gradient: gradient + injected)


def _tokens(pooled: Pooled, routing: Routing | None) -> Tensor:
    """The token of each row of a product: int64 [M]."""
    return torch.arange(len(pooled.row), device=pooled.row.device) if routing is None else routing.tokens


def _keys(pooled: Pooled, routing: Routing | None, unit: Unit) -> tuple[Tensor, int]:
    """One number for a micro-batch's row and an expert, row · experts + expert: int64 [M]; and how many experts."""
    if routing is None:
        return pooled.row, 1
    experts = shape_of(unit.parameter)[0]
    return pooled.row[routing.tokens] * experts + routing.experts, experts


def _raise(capture: Capture) -> None:
    if capture.failure is not None:
        raise ValueError(capture.failure)
