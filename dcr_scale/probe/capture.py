"""Every unit's gradient, one prompt at a time, from one forward and one input-only backward pass.

No weight requires a gradient, so none is ever formed; the graph begins at the embedding's output, or at the lowest
counted weight's where it may. What a prompt's gradient is made of goes to a :class:`Sink` as it comes by: a linear's
input and its output's gradient (their sum of outer products over the prompt's tokens is the gradient), the tokens an
embedding looked up, an element-wise module's summed gradient. Under ZeRO-3 nothing is gathered that the passes do not
gather themselves.

Shape suffixes: B rows of the micro-batch (a prompt under one output probe each), T tokens, M rows of a matrix product
(tokens, or the (token, slot) pairs of routed experts), D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer

from dcr_scale.models.trunk import decoder_layers
from dcr_scale.probe.experts import run_experts
from dcr_scale.probe.layout import Routing, TokenLayout
from dcr_scale.probe.shared_inputs import SharedInputs
from dcr_scale.probe.units import Factor, Inventory, Unit, elementwise_factors, is_experts, lookup_scale, shape_of

_EXPERTS = "dcr_probe"
# The probe whose passes are running: transformers' experts interface calls a function that knows only its module.
_active: Capture | None = None


class Sink(Protocol):
    """What a pass's gradients go to. ``routing`` is None outside of experts, where a row is a token."""

    def begin(self, layout: TokenLayout) -> None:
        """A backward pass begins: what follows, up to :meth:`end`, are the gradients of this layout's rows."""
        return None

    def end(self) -> None:
        """The backward pass is over."""
        return None

    def enter(self, units: Sequence[Unit], inputs_MD: Tensor, routing: Routing | None) -> Sequence[Tensor]:
        """What the backward pass will need, for each unit, of an input that all of them read; finite where it is."""

    def product(self, unit: Unit, kept: Tensor, delta_MD: Tensor, routing: Routing | None) -> Tensor | None:
        """The gradient Σ δ aᵀ of a linear or of experts. Returns what is made of all of δ, finite where that is, the
        smaller the cheaper to look at; None where δ need not be."""

    def lookup(self, unit: Unit, ids_T: Tensor, delta_TD: Tensor) -> None:
        """The gradient of a table of token vectors."""

    def vector(self, unit: Unit, gradient_BD: Tensor) -> None:
        """The gradient of a vector."""


class Capture:
    """Runs passes through a model with every counted gradient led to a sink; use :meth:`installed` around them.

    Attributes:
        failure: what went wrong in the passes so far, or None. It is not raised at once: under ZeRO-3 the other ranks
            would wait for this one in their next pass.
    """

    # The current pass's.
    _sink: Sink
    _layout: TokenLayout
    _hidden: Tensor

    def __init__(self, model: PreTrainedModel, inventory: Inventory):
        self.model, self.inventory = model, inventory
        self.failure: str | None = None
        self._backward = False
        # A unit's name, and the sum of what came by: not finite as soon as one number is not.
        self._sums: list[tuple[str, Tensor]] = []
        self._seen: set[str] = set()
        # Recomputed inputs of element-wise modules that wait for their gradient, and the other way round.
        self._waiting: dict[int, dict[str, Tensor]] = {}
        self._inputs = SharedInputs()
        self._products = {id(unit.parameter): unit for unit in inventory.units if unit.kind == "linear"}
        self._routed_products = {id(unit.parameter): unit for unit in inventory.units if unit.kind == "experts"}
        self._lookups = {id(unit.module): unit for unit in inventory.units if unit.kind == "embedding"}
        self._scales = {id(unit.module): lookup_scale(unit) for unit in self._lookups.values()}
        self._vectors: dict[int, list[tuple[Unit, Factor]]] = {}
        for unit in inventory.units:
            if unit.kind == "vector" and id(unit.module) not in self._vectors:
                self._vectors[id(unit.module)] = self._vector_rules(unit)

    def _vector_rules(self, first: Unit) -> list[tuple[Unit, Factor]]:
        keys = {id(parameter): key for key, parameter in first.module.named_parameters(recurse=False)}
        length = shape_of(first.parameter)[0]
        example = torch.arange(3 * length, device=first.parameter.device).view(3, length).sin()
        try:
            factors = elementwise_factors(first.module, example)
        except Exception as error:  # a model's own code runs here, on an input that it may not be made for
            raise ValueError(
                f"{first.name}: no rule sketches it in a {type(first.module).__name__} ({error}); leave it out by "
                'parameters="trainable" or a name pattern'
            ) from error
        units = [unit for unit in self.inventory.units if unit.module is first.module]
        return [(unit, factors[keys[id(unit.parameter)]]) for unit in units]

    # --- passes ------------------------------------------------------------------------------------------------

    @torch.enable_grad()  # measured under no_grad, gradients would all be zero
    def run(
        self, sink: Sink, layout: TokenLayout, inputs: dict[str, Any], *cotangents_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One forward pass of a micro-batch, and one backward pass for each of ``cotangents_BD``.

        Args:
            inputs: the model's keywords.
            cotangents_BD: what each row's final hidden state is multiplied by: the scalar whose gradient is taken.
                A single one where :attr:`one_backward` holds.

        Returns:
            The final hidden states at the rows' last tokens, float32 [B, D], and the model's logits.
        """
        self._sink, self._layout = sink, layout
        self._seen.clear()
        logits = self.model(**inputs).logits
        hidden_BD = self._hidden.reshape(-1, self._hidden.shape[-1])[layout.last]
        del self._hidden
        self._inputs.forget()
        for number, cotangent_BD in enumerate(cotangents_BD, start=1):
            sink.begin(layout)
            self._backward = True
            if hidden_BD.requires_grad:  # else no counted weight stands below it
                hidden_BD.backward(cotangent_BD.to(hidden_BD.dtype), retain_graph=number < len(cotangents_BD))
            self._backward = False
            sink.end()
            self._waiting.clear()
        self._fail(self._what_failed())
        return hidden_BD.detach().float(), logits.detach()

    @cached_property
    def one_backward(self) -> bool:
        """Whether a forward pass can be followed by one backward pass only: ZeRO-3 lets go of the weights in it."""
        return any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())

    def _what_failed(self) -> str | None:
        sums, self._sums = self._sums, []
        names = [name for name, _ in sums]
        # One transfer from the device for all of them.
        finite = torch.stack([total for _, total in sums]).isfinite().tolist() if sums else []
        if not all(finite):
            return f"{names[finite.index(False)]}: the activations or gradients that pass through it are not finite"
        for unit in self.inventory.units:
            if unit.name not in self._seen:
                return (
                    f"{unit.name}: its {type(unit.module).__name__} took part in the pass in a way that no rule "
                    'covers, or not at all; leave it out by parameters="trainable" or a name pattern'
                )
        return None

    def _fail(self, failure: str | None) -> None:
        self.failure = self.failure or failure

    def _note(self, unit: Unit, what: Tensor | None) -> None:
        """The unit took part. ``what``: what must be finite; None where another unit has been noted with the same."""
        self._seen.add(unit.name)
        if what is not None:
            self._sums.append((unit.name, what.sum(dtype=torch.float32)))

    def _note_output(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Between the weights that count, numbers can go wrong as well."""
        if not self._backward:
            hidden = output if isinstance(output, Tensor) else output[0]
            self._sums.append((name, hidden.detach().sum(dtype=torch.float32)))

    # --- what comes by -----------------------------------------------------------------------------------------

    def _linear(self, unit: Unit, x: Tensor, output: Tensor) -> None:
        layout, rows = self._layout, x.numel() // x.shape[-1]
        if rows != layout.tokens:
            self._fail(
                f"{unit.name}: met {rows} rows where the micro-batch has {layout.tokens} tokens; no rule covers a "
                'module that selects tokens; leave it out by parameters="trainable" or a name pattern'
            )
            return
        kept, is_first = self._inputs.enter(self._sink, unit, x)
        self._note(unit, None if not is_first else kept if unit.weight else x.detach())
        self._begin_at(output)

        def receive(delta: Tensor) -> None:
            self._note(unit, self._sink.product(unit, kept, delta.reshape(rows, -1), None))

        output.register_hook(receive)

    def _routed(self, unit: Unit, x_MD: Tensor, output_MD: Tensor, routing: Routing) -> None:
        (kept,) = self._sink.enter([unit], x_MD.detach(), routing)
        self._note(unit, kept if unit.weight else x_MD.detach())
        self._begin_at(output_MD)

        def receive(delta_MD: Tensor) -> None:
            self._note(unit, self._sink.product(unit, kept, delta_MD, routing))

        output_MD.register_hook(receive)

    def _vector_output(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if self._backward:
            return
        # Kept from the forward pass, the input would undo what recomputation saves.
        kept = None if id(module) in self._recomputed else x.detach()
        self._begin_at(output)

        def receive(delta: Tensor) -> None:
            if kept is None:
                self._meet(module, delta=delta)
            else:
                self._vector_gradient(module, kept, delta)

        output.register_hook(receive)

    def _vector_recomputed(self, module: nn.Module, x: Tensor) -> None:
        if self._backward:
            self._meet(module, x=x.detach())

    def _meet(self, module: nn.Module, **one: Tensor) -> None:
        """A recomputed input can come before the gradient or after it: the second of the two goes on."""
        other = self._waiting.pop(id(module), {})
        if other.keys() == one.keys():
            name = self._vectors[id(module)][0][0].name
            self._fail(f"{name}: used twice in a layer that is recomputed, and no rule tells its inputs apart")
        elif other:
            self._vector_gradient(module, **one, **other)
        else:
            self._waiting[id(module)] = one

    @torch.no_grad()
    def _vector_gradient(self, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        layout = self._layout
        for unit, factor in self._vectors[id(module)]:
            values, scale = factor(x)
            (length,) = shape_of(unit.parameter)
            if values.shape[-1] != length:
                self._fail(
                    f"{unit.name}: its {length} numbers are broadcast over {values.shape[-1]} features, and no rule "
                    'sketches that; leave it out by parameters="trainable" or a name pattern'
                )
                return
            product_THD = self._tokens_first(unit, delta.float() * values)
            if product_THD is None:
                return
            scale_TH1 = None if scale is None else self._tokens_first(unit, scale)
            if product_THD.shape[1] == 1:
                gradient_BD = layout.sums(product_THD[:, 0], None if scale_TH1 is None else scale_TH1[:, 0, 0])
            else:
                gradient_BD = layout.sums(
                    product_THD.sum(dim=1) if scale_TH1 is None else torch.bmm(scale_TH1.mT, product_THD)[:, 0]
                )
            self._note(unit, gradient_BD)
            self._sink.vector(unit, gradient_BD)

    def _tokens_first(self, unit: Unit, x: Tensor) -> Tensor | None:
        """What an element-wise module saw as [tokens, heads, D]: norms of heads see a token several times.

        Models lay heads out before the tokens or after them. Micro-batches are never as long as there are heads.
        None where the tokens cannot be told, which is then the failure.
        """
        batch, length = self._layout.shape
        if x.dim() == 4 and x.shape[1] != length and x.shape[2] == length:
            x = x.transpose(1, 2)
        if x.numel() != batch * length * x.shape[-1] and x.shape[:2] != (batch, length):
            self._fail(
                f"{unit.name}: met values of shape {list(x.shape)}, in which no rule finds the micro-batch's "
                f'{batch} × {length} tokens; leave it out by parameters="trainable" or a name pattern'
            )
            return None
        return x.reshape(batch * length, -1, x.shape[-1])

    @cached_property
    def _recomputed(self) -> set[int]:
        return {id(inner) for layer in checkpointed_layers(self.model) for inner in layer.modules()}

    # --- hooks -------------------------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the model's passes; on leaving, it is as it was."""
        global _active
        if _active is not None:
            raise RuntimeError("another probe is measuring in this process")
        with ExitStack() as stack:
            stack.callback(self._clear)
            _active, self.failure = self, None
            self._patch_linear(stack)
            self._hook_modules(stack)
            self._route_experts(stack)
            yield

    def _clear(self) -> None:
        global _active
        _active = None
        for name in ("_sink", "_layout", "_hidden"):
            vars(self).pop(name, None)
        self._backward = False
        self._inputs.forget()
        self._sums.clear()
        self._waiting.clear()

    def _patch_linear(self, stack: ExitStack) -> None:
        """Linears and routers alike apply their matrix through this function, whichever module they are.

        Under ZeRO-3 it is DeepSpeed's own by now; the parameter is still the object that comes in.
        """
        original = F.linear

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            output = original(input, weight, bias)
            unit = self._products.get(id(weight))
            if unit is not None and not self._backward:
                self._linear(unit, input, output)
            return output

        F.linear = linear
        stack.callback(setattr, F, "linear", original)

    def _hook_modules(self, stack: ExitStack) -> None:
        def final(module: nn.Module, args: Any, output: Any) -> None:
            self._hidden = output.last_hidden_state

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._vector_recomputed(module, _first(args, kwargs))

        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            self._vector_output(module, _first(args, kwargs), output)

        decoder = self.model.get_decoder()
        stack.callback(decoder.register_forward_hook(final).remove)
        stations = {id(module) for module in (*decoder_layers(self.model), decoder)}
        for name, module in self.model.named_modules():
            if id(module) in stations or isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(partial(self._note_output, name)).remove)
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(self._embedded).remove)
            if id(module) in self._vectors:
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
                if id(module) in self._recomputed:
                    # Not after: recomputation stops as soon as it has what it needs, in the midst of a module.
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    @cached_property
    def _begins_at_embedding(self) -> bool:
        """ZeRO-3 lets go of a module's weights when the gradient reaches its input, and a recomputed layer must save
        what it saved before: both need a graph through all layers."""
        return self.one_backward or bool(self._recomputed)

    @staticmethod
    def _begin_at(output: Tensor) -> None:
        """The graph begins here where nothing below requires a gradient."""
        if not output.requires_grad:
            output.requires_grad_()

    def _embedded(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """What the layers read. Its gradient is the embedding's, where that is counted."""
        unit = self._lookups.get(id(module))
        if unit is None and not self._begins_at_embedding:
            return output
        leaf = output.detach().requires_grad_()
        if unit is not None:
            ids_T, layout, scale = args[0].reshape(-1), self._layout, self._scales[id(module)]
            self._seen.add(unit.name)

            def receive(delta: Tensor) -> None:
                delta_TD = delta.reshape(layout.tokens, -1) * scale
                if module.padding_idx is not None:
                    # The padding token's vector never trains, wherever the token stands.
                    delta_TD = delta_TD * (ids_T != module.padding_idx)[:, None]
                self._note(unit, delta_TD)
                self._sink.lookup(unit, ids_T, delta_TD)

            leaf.register_hook(receive)
        return leaf

    def _route_experts(self, stack: ExitStack) -> None:
        configs = {id(m.config): m.config for m in self.model.modules() if is_experts(m)}
        for config in configs.values():
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = _EXPERTS

    def experts_product(self, weight: Tensor, x_MD: Tensor, output_MD: Tensor, routing: Routing) -> None:
        unit = self._routed_products.get(id(weight))
        if unit is not None and not self._backward:
            self._routed(unit, x_MD, output_MD, routing)


def _experts_forward(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    assert _active is not None, "a model is told to run its experts here for the time of a measurement"
    return run_experts(module, hidden, index, weights, _active.experts_product)


ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _experts_forward)


def checkpointed_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that recompute their activations in the backward pass."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
