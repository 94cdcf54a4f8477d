"""What a pass keeps for its backward pass and what it needs beside, counted on tensors that have a shape and no data.

The stage's own module runs forward and backward on fake tensors, at two and at three layers: what autograd saves is
counted, storage by storage, and so is everything that operations allocate. Further layers add what the third one did.
No formula has to follow a model's code, and none falls behind it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from dcr_scale.config import AlignConfig, ModelConfig, RefineConfig
from dcr_scale.data.packing import Pack, PackLayout
from dcr_scale.models.lora import adapter_config
from dcr_scale.models.response_loss import ResponseLoss, storage_of
from dcr_scale.models.trunk import Trunk, build_model, decoder_layers, depth, truncated
from dcr_scale.refine import trains_embeddings

# Layers of the two models that are run: the first layer can differ from the others (its input needs no gradient).
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, without weights and what is accumulated of their gradients.

    Attributes:
        kept: from its forward to its backward pass.
        layers: the most that is there at once in the layers and below, in either pass, of what is kept and beside it.
        above: the same from the end of the last layer's forward pass to the beginning of its backward pass.
    """

    kept: int
    layers: int
    above: int


def trunk_activations(
    config: PretrainedConfig,
    settings: RefineConfig,
    model: ModelConfig,
    *,
    prefix: int,
    contrast: Sequence[int],
    retained: Sequence[int],
    attention: str,
    dtype: torch.dtype,
) -> Activations:
    """Of stage 1, for one pack of contrast prompts and retained ones that have so many tokens after the prefix."""

    def build(layers: int) -> nn.Module:
        trunk = Trunk(
            config, layers, attention=attention, dtype=dtype, trust_remote_code=model.trust_remote_code
        )  # fmt: skip
        if not trains_embeddings(settings, config):
            for parameter in trunk.embedding_parameters():
                parameter.requires_grad_(False)
        return _checkpointed(trunk, trunk.decoder, model)

    batch = _layout(prefix, [*contrast, *retained])
    end = prefix + sum(contrast)
    last = torch.tensor(batch.starts[1 : len(contrast) + 1]) - 1

    def loss(trunk: nn.Module) -> Tensor:
        hidden_TD = trunk(_pack(batch))
        pooled_ND = F.normalize(hidden_TD[last].float(), dim=-1)
        objective = (pooled_ND @ pooled_ND.T).sum()
        if retained:
            new_TD = torch.cat([hidden_TD[:prefix], hidden_TD[end:]]).float()
            objective = objective + (new_TD - torch.ones_like(new_TD)).square().sum(-1).sum()
        return objective

    return _extrapolated(build, loss, settings.chosen_layer)


def model_activations(
    config: PretrainedConfig,
    settings: AlignConfig,
    model: ModelConfig,
    *,
    prefix: int,
    examples: Sequence[int],
    responses: int,
    attention: str,
    dtype: torch.dtype,
) -> Activations:
    """Of stage 2, for one pack of examples that have so many tokens after the prefix, ``responses`` of them answers."""

    def build(layers: int) -> nn.Module:
        whole = build_model(
            truncated(config, layers), attention=attention, dtype=dtype, trust_remote_code=model.trust_remote_code
        )
        if settings.method == "lora":
            whole.requires_grad_(False)
            inject_adapter_in_model(adapter_config(settings.lora, whole), whole)
            for parameter in whole.parameters():
                # The engine holds everything in one dtype; peft makes its factors float32, and inputs would follow.
                parameter.data = parameter.data.to(dtype)
        return _checkpointed(ResponseLoss(whole), whole, model)

    batch, checked = _layout(prefix, examples), _layout(prefix, (1,))
    at, targets_N, first = torch.arange(responses), torch.zeros(responses, dtype=torch.int64), torch.arange(1)

    def loss(whole: Any) -> Tensor:
        with torch.no_grad():
            whole(_pack(checked), first)  # as the check of the packing does, which finds out what the head is
        return whole.summed(_pack(batch), at, targets_N)

    return _extrapolated(build, loss, depth(config))


def _extrapolated(build: Callable[[int], nn.Module], loss: Callable[[nn.Module], Tensor], layers: int) -> Activations:
    if layers <= _MORE:
        return _count(build, loss, layers)
    few, more = (_count(build, loss, number) for number in (_FEW, _MORE))
    further = layers - _MORE
    counts = zip(astuple(few), astuple(more), strict=True)
    return Activations(*(later + further * (later - earlier) for earlier, later in counts))


def _count(build: Callable[[int], nn.Module], loss: Callable[[nn.Module], Tensor], layers: int) -> Activations:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        module = build(layers).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(module)
        weights = {storage_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        for parameter in module.parameters():
            if parameter.requires_grad:
                # ZeRO-3 takes a gradient away as soon as it is there.
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        saved = SavedBytes(weights)
        with AllocatedBytes(weights) as allocated:
            _watch_last_layer(module, allocated)
            with saved:
                objective = loss(module)
            objective.backward()
    return Activations(saved.total, allocated.peaks["layers"], allocated.peaks["above"])


def _watch_last_layer(module: nn.Module, allocated: AllocatedBytes) -> None:
    """Have what is allocated between the last layer's two passes counted by itself."""

    def forward_ends(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # Once: a pass without gradients has no other half, and where a layer is recomputed it is in its backward pass.
        if allocated.over or not hidden.requires_grad:
            return
        allocated.place = "above"
        hidden.register_hook(backward_begins)

    def backward_begins(_: Tensor) -> None:
        allocated.place, allocated.over = "layers", True

    decoder_layers(module)[-1].register_forward_hook(forward_ends)


def _checkpointed(module: nn.Module, network: PreTrainedModel, model: ModelConfig) -> nn.Module:
    if model.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return module


def _to_fake(module: nn.Module) -> None:
    """Put tensors that pass for the CPU's in the place of those on the meta device: kernels are chosen by the device,
    and what they save differs. (A module built among fake tensors could not get adapters.)"""
    known: dict[int, Any] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in known:
                made = torch.empty_like(parameter, device="cpu")
                known[id(parameter)] = parameter, nn.Parameter(made, requires_grad=parameter.requires_grad)
            owner._parameters[name] = known[id(parameter)][1]
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = torch.empty_like(buffer, device="cpu")


def _layout(prefix: int, lengths: Sequence[int]) -> PackLayout:
    layout = PackLayout(prefix, tuple(lengths), torch.device("cpu"))
    # Made now: where fake tensors are made, none has values to make them of.
    for name in ("cu_seqlens", "cu_queries", "cu_keys", "key_index", "padded_rows", "positions"):
        getattr(layout, name)
    return layout


def _pack(layout: PackLayout) -> Pack:
    return Pack(torch.zeros(1, layout.tokens, dtype=torch.int64), layout)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """``total`` bytes of the distinct storages that autograd saves inside the context, but for those of ``weights``."""

    def __init__(self, weights: set[int]):
        self.total = 0
        self._seen: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            key = storage_of(tensor)
            if key not in weights and key not in self._seen:
                self._seen[key] = tensor.untyped_storage()  # held, so that no other takes its number
                self.total += tensor.untyped_storage().nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


class AllocatedBytes(TorchDispatchMode):
    """``peaks``: by place, bytes of storages alive at once among those that operations inside the context make.

    Whoever knows where the pass is sets ``place``; ``over``: it has been above the layers and come back.
    """

    def __init__(self, weights: set[int]):
        super().__init__()
        self.place: Literal["layers", "above"] = "layers"
        self.over = False
        self.peaks = {"layers": 0, "above": 0}
        self._weights = weights
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = False
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    made = True
        if made:
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            alive = sum(size for _, size in self._alive.values())
            self.peaks[self.place] = max(self.peaks[self.place], alive)
        return result
