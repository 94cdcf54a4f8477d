"""A model as ZeRO-3 sees it: its modules in the order they run, and the sizes of the parameters each holds.

Everything is built on the meta device: names and shapes, no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch
from deepspeed.utils import z3_leaf_module
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PretrainedConfig

from dcr_scale.config import AlignConfig, RefineConfig
from dcr_scale.models.lora import adapter_config
from dcr_scale.models.trunk import Trunk, build_skeleton, decoder_layers
from dcr_scale.refine import trains_embeddings
from dcr_scale.zero3 import mark_leaves


@dataclass(frozen=True)
class Parameter:
    """A parameter that several modules may share. ``number``: its place among the model's; ``matrix``: it has more
    than one dimension; ``adapter``: stage 2 added it, so no checkpoint holds it."""

    number: int
    numel: int
    trained: bool
    matrix: bool
    adapter: bool

    def part(self, world_size: int) -> int:
        """Elements of one rank's partition, its padding included: ZeRO-3 cuts every parameter by itself."""
        return -(-self.numel // world_size)


@dataclass(frozen=True)
class Use:
    """A module that holds parameters itself. ``layer``: the decoder layer it is part of, None outside them; ``kind``:
    linear, experts, embedding or other; ``share``: the part of its parameters that one token is multiplied with, below
    1 for experts of which few are routed to."""

    parameters: tuple[Parameter, ...]
    layer: int | None
    kind: str
    share: float


@dataclass(frozen=True)
class Call:
    """A module's forward pass: the parameters that ZeRO-3 gathers for it, and the modules it calls, in that order.

    ``parameters`` are its own; those of all modules inside too where it is a ``leaf`` to ZeRO-3, as a block of experts.
    ``within``: with those of all it calls. ``layer``: the decoder layer it is, or is part of; None outside them.
    """

    parameters: tuple[Parameter, ...]
    layer: int | None
    calls: tuple[Call, ...]
    leaf: bool

    @cached_property
    def within(self) -> tuple[Parameter, ...]:
        return tuple(dict.fromkeys((*self.parameters, *(p for call in self.calls for p in call.within))))


@dataclass(frozen=True)
class ModuleList:
    """A model's parameters, each once, its modules that hold any, and how they call each other."""

    parameters: tuple[Parameter, ...]
    uses: tuple[Use, ...]
    root: Call
    layers: int

    @property
    def adapted(self) -> int:
        """Elements of the weights that adapters stand beside."""
        return sum(self.uses[i - 1].parameters[0].numel for i in self._first_adapters())

    def _first_adapters(self) -> list[int]:
        """Places of the adapters' first factors: each follows the module that it adapts."""
        adapter = [any(p.adapter for p in use.parameters) for use in self.uses]
        return [i for i, there in enumerate(adapter) if there and not adapter[i - 1]]

    @property
    def held(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trained(self) -> int:
        """Elements of the trained parameters."""
        return sum(parameter.numel for parameter in self.parameters if parameter.trained)


def trunk_modules(config: PretrainedConfig, settings: RefineConfig, *, trust_remote_code: bool = False) -> ModuleList:
    """Stage 1's model: the embedding and the first ℓ layers, the embedding frozen unless the settings train it."""
    with torch.device("meta"):
        trunk = Trunk(
            config,
            settings.chosen_layer,
            attention="sdpa",
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    if not trains_embeddings(settings, config):
        for parameter in trunk.embedding_parameters():
            parameter.requires_grad_(False)
    return list_modules(trunk.decoder, config)


def whole_modules(config: PretrainedConfig, settings: AlignConfig, *, trust_remote_code: bool = False) -> ModuleList:
    """Stage 2's model: the whole, trained throughout, or frozen with adapters on its linear layers."""
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    if settings.method == "full":
        return list_modules(model, config)
    model.requires_grad_(False)
    base = {id(parameter) for parameter in model.parameters()}
    with torch.device("meta"):
        inject_adapter_in_model(adapter_config(settings.lora, model), model)
    return list_modules(model, config, base)


def list_modules(model: nn.Module, config: PretrainedConfig, base: set[int] | None = None) -> ModuleList:
    """Read the modules off a built model. ``base``: ids of the parameters that are no adapter's; None: all."""
    text = config.get_text_config()
    routed, experts = getattr(text, "num_experts_per_tok", None), _experts(text)
    stack = decoder_layers(model)
    layer_of = {id(module): number for number, layer in enumerate(stack) for module in layer.modules()}
    known: dict[int, Parameter] = {}
    uses = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        for p in own:
            adapter = base is not None and id(p) not in base
            known.setdefault(id(p), Parameter(len(known), p.numel(), p.requires_grad, p.dim() > 1, adapter))
        if not own:
            continue
        kind, share = "other", 1.0
        if isinstance(module, nn.Embedding):
            kind = "embedding"
        elif isinstance(module, nn.Linear):
            kind = "linear"
        elif any(p.dim() == 3 for p in own):
            kind, share = "experts", (routed or 1) / (experts or 1)
        elif any(p.dim() == 2 for p in own):
            kind = "linear"  # routers, which transformers writes as modules of their own
        uses.append(Use(tuple(known[id(p)] for p in own), layer_of.get(id(module)), kind, share))
    mark_leaves(model)
    (root,) = _calls(model, known, layer_of)
    return ModuleList(tuple(known.values()), tuple(uses), root, len(stack))


def _calls(module: nn.Module, known: dict[int, Parameter], layer_of: dict[int, int]) -> list[Call]:
    """The call of a module, or of those that it lists where it is a mere list of modules.

    Modules list what they consist of, which is the order it runs in, but for two: norms, which run around what they
    are listed after; and what holds nothing and is listed last (an activation function, rotary embeddings), which runs
    after the first.
    """
    layer, leaf = layer_of.get(id(module)), z3_leaf_module(module)
    inside = [] if leaf else [call for child in module.children() for call in _calls(child, known, layer_of)]
    if type(module).forward is nn.Module.forward:
        return inside
    if layer is not None:
        inside = _norms_between(inside)
    if inside and not inside[-1].parameters and not inside[-1].calls:
        inside.insert(1, inside.pop())
    parameters = tuple(known[id(p)] for p in module.parameters(recurse=leaf))
    if isinstance(module, LoraLayer):
        # peft asks the first factor for its dtype on the way in, and DeepSpeed takes that for a use by this module.
        parameters += tuple(known[id(factor.weight)] for factor in module.lora_A.values())
    return [Call(parameters, layer, tuple(inside), leaf)]


def _norms_between(calls: list[Call]) -> list[Call]:
    """A layer's norms before its blocks, or before and after them; an attention's after the matrices they follow."""
    norms = [call for call in calls if call.parameters and not any(p.matrix for p in call.parameters)]
    others = [call for call in calls if call not in norms]
    if not norms or not others:
        return calls
    if not any(call.calls for call in others):
        return [call for pair in zip_longest(others, norms) for call in pair if call is not None]
    each, more = divmod(len(norms), len(others))
    ordered, norms = norms[:more], norms[more:]
    for number, block in enumerate(others):
        own = norms[each * number : each * (number + 1)]
        ordered += [*own[:1], block, *own[1:]]
    return ordered


def _experts(text: PretrainedConfig) -> int | None:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((getattr(text, name) for name in names if getattr(text, name, None)), None)
