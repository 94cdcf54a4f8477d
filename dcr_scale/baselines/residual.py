"""A decoder's residual stream, watched and changed while the model runs.

The stream at depth d is what d layers have written: depth 0 is the embedding that the first layer reads, depth d the
output of layer d - 1. Hooks find their places by structure, in any decoder of transformers, also inside a peft model.

Shape suffixes: B prompts of a batch, S its columns, P positions, D width, L layers, T tokens, K parts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dcr_scale.errors import UserError
from dcr_scale.evaluation.generation import dense_attention
from dcr_scale.models.trunk import decoder_layers

# By how much the sum of its parts may miss what a layer adds, as a share of it: bfloat16 rounds coarsely.
_UNEXPLAINED = 0.2
# What a part adds, as a share of what its layer adds: below, it is noise of the fit.
_NO_SHARE = 0.02
_PROBE_TOKENS = 16


def backbone(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder's layers, which every way to run the model calls, and the layers."""
    layers = decoder_layers(model)
    owner = next(module for module in model.modules() if any(child is layers for child in module.children()))
    return owner, layers


def width(model: nn.Module) -> int:
    """D, the width of the residual stream."""
    config = cast(PretrainedConfig, model.config)
    return config.get_text_config().hidden_size


def left_padded(encoded: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as rows that end together: ``ids`` and ``mask``, int64 [B, S]."""
    longest = max(map(len, encoded))
    # Padding is masked out, so any token will do.
    ids = torch.zeros(len(encoded), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens, device=device)
        mask[row, longest - len(tokens) :] = 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Position ids int64 [B, S] of left-padded rows, as ``generate`` numbers them."""
    return (mask.cumsum(dim=-1) - 1).clamp_min(0)


@torch.no_grad()
def residuals(model: nn.Module, ids: Tensor, mask: Tensor, columns: Sequence[int]) -> Tensor:
    """The residual stream at some columns of left-padded rows: float32 [B, P, L + 1, D], depths 0 to L."""
    owner, layers = backbone(model)
    at = torch.tensor(columns, device=ids.device)
    depths_BPD: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A steering in force may have run the prompts once before this pass.
        depths_BPD[:] = [_input(args, kwargs)[:, at].float()]

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        depths_BPD.append(_first(output)[:, at].float())

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    with removed(handles):
        owner(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    device = depths_BPD[0].device
    return torch.stack([depth.to(device) for depth in depths_BPD], dim=2)


@torch.no_grad()
def residual_writers(model: nn.Module) -> list[nn.Module]:
    """The parts of each layer whose outputs it adds to the residual stream, in most families attention and MLP.

    Found by arithmetic, whatever they are called: what a layer adds to its input is fitted by a weighted sum of its
    parts' outputs on a few tokens. Post-normed families add the output of a norm, parallel ones two parts at once, some
    scale what they add. One short forward pass of the padded kind; under ZeRO-3 every rank makes it.

    Raises UserError for a layer that is no such sum: its residual stream cannot be kept clear of a direction.
    """
    owner, layers = backbone(model)
    seen: dict[nn.Module, Tensor] = {}
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(_input(args, kwargs))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(_first(output))

    def part(module: nn.Module, args: tuple, output: Any) -> None:
        found = _first(output)
        if isinstance(found, Tensor) and found.shape == inputs[-1].shape:
            seen[module] = found

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
        handles += [child.register_forward_hook(part) for child in layer.children()]
    config = cast(PretrainedConfig, model.config)
    # The second half of a vocabulary may be other scripts' tokens, or padding.
    ids = torch.linspace(0, config.get_text_config().vocab_size // 2, _PROBE_TOKENS).long()[None]
    ids = ids.to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    with removed(handles), dense_attention(cast(PreTrainedModel, model)):
        owner(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    shares: dict[str, list[float]] = {}
    for number, (layer, before_TD, after_TD) in enumerate(zip(layers, inputs, outputs, strict=True)):
        parts = {name: seen[child] for name, child in layer.named_children() if child in seen}
        shares_K, unexplained = _shares(before_TD, after_TD, list(parts.values()))
        if unexplained > _UNEXPLAINED:
            raise UserError(
                f"{type(layer).__name__}: layer {number} does not add its parts' outputs to the residual stream "
                f"({unexplained:.0%} of what it adds comes from elsewhere), so no direction can be ablated from it"
            )
        for name, share in zip(parts, shares_K, strict=True):
            shares.setdefault(name, []).append(share)
    # Layers are built alike, and one that hardly writes on these tokens may on others.
    writing = {name for name, found in shares.items() if sum(found) / len(found) > _NO_SHARE}
    return [child for layer in layers for name, child in layer.named_children() if name in writing]


def _shares(before_TD: Tensor, after_TD: Tensor, parts: list[Tensor]) -> tuple[list[float], float]:
    """With weights w of after - before = Σ w · part by least squares: the size of each w · part and of what they miss,
    both as shares of the left side's."""
    if not parts:
        return [], 1.0
    before, after = before_TD.double().flatten().cpu(), after_TD.double().flatten().cpu()
    # Each number counts by the precision that it has: a few channels of huge activations would drown the rest.
    scale = before.abs() + after.abs()
    scale = 1 / (scale + scale.mean())
    added = (after - before) * scale
    columns = torch.stack([part.double().flatten().cpu() * scale for part in parts], dim=1)
    # In evaluation mode a dropout's output is its input: of columns that are the same, each gets its part.
    weights = torch.linalg.lstsq(columns, added[:, None], driver="gelsd").solution[:, 0]
    size = added.norm().clamp_min(torch.finfo(torch.float64).tiny)
    missed = columns @ weights - added
    return (columns * weights).norm(dim=0).div(size).tolist(), float(missed.norm() / size)


@contextmanager
def ablated(model: nn.Module, vector_D: Tensor, writers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the residual stream clear of a direction at every token, between the layers and within them.

    Directional ablation (arXiv 2406.11717): x ← x - v̂ (v̂ · x). The projection is linear, so it is enough to apply it to
    all that is ever written: the embedding, and what :func:`residual_writers` found. It is computed in float32, on
    whatever the model runs: padded rows, packs, single tokens behind a cache.
    """
    _, layers = backbone(model)
    unit_D = vector_D.float() / vector_D.float().norm()

    def cleared(hidden: Tensor) -> Tensor:
        unit = unit_D.to(hidden.device)
        wide = hidden.float()
        return (wide - (wide @ unit)[..., None] * unit).to(hidden.dtype)

    handles = [on_input(layers[0], cleared), *(on_output(module, cleared) for module in writers)]
    with removed(handles):
        yield


def on_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Have a decoder layer read ``change(hidden states)``."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Have a layer, or a part of one, return ``change(hidden states)``; what it returns beside them stays."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(hook)


@contextmanager
def removed(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone afterwards, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
