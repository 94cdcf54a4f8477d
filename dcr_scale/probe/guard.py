"""A model made ready to be probed, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dcr_scale.models import attention
from dcr_scale.probe.capture import checkpointed_layers

# What models in transformers do to their head's product with the final hidden state, as their configurations say it.
_LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
# Under which names modules keep a rate for `functional.dropout`.
_DROPOUT_RATES = (
    "attention_dropout", "hidden_dropout", "activation_dropout", "dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop",
)  # fmt: skip
_OURS = (attention.FLASH_ATTN, attention.TORCH_VARLEN, attention.SDPA)


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model in ``model``, which may be a DeepSpeed engine."""
    return model.module if hasattr(model, "micro_steps") else model


def check_between_updates(engine: Any) -> None:
    """Raise ValueError for a DeepSpeed engine in the middle of an accumulation; any other model passes."""
    if not hasattr(engine, "micro_steps"):
        return
    steps = engine.gradient_accumulation_steps()
    if engine.micro_steps % steps:
        raise ValueError(
            f"the engine has taken {engine.micro_steps % steps} of the {steps} micro-steps of an update; measure "
            "between updates"
        )
    # Micro-steps are counted in step(), and not at all where the caller sets the boundary. ZeRO itself knows more.
    # Stage 3's flag is up from the end of a backward pass to the next forward pass or update, when micro_step_id goes
    # up from 0 or back to it. In stages 1 and 2 an update leaves the flag up, but puts micro_step_id back to −1, from
    # which every backward pass raises it. Without ZeRO, gradients stay where autograd puts them.
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        reduced = getattr(optimizer, "_epilogue_ran_this_backward", False) or getattr(optimizer, "micro_step_id", 0) > 0
    else:
        reduced = getattr(optimizer, "micro_step_id", -1) >= 0
    if reduced or any(parameter.grad is not None for parameter in engine.module.parameters()):
        raise ValueError(
            "the engine holds gradients of an update that it has not made; measure between updates: after step(), "
            "before the next backward pass"
        )


def check_ready(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the module, for a model whose passes would be random or could not be watched."""
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() is on, which records no gradients; measure outside of it")
    text = model.config.get_text_config()
    for name in (*_LOGIT_CAPS, *_LOGIT_SCALES):
        value = getattr(text, name, None)
        # The passes' own comparison finds no mild one in bfloat16.
        if value is not None and (name in _LOGIT_CAPS or value != 1):
            raise ValueError(
                f"{name}={value} in the model's configuration: its logits are capped or scaled, and no longer its "
                "head's product with the final hidden state"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"{name}: dropout of {module.p:g} is on, and gradients would be random; call model.eval() first"
            )
        for attribute in _DROPOUT_RATES:
            rate = getattr(module, attribute, 0.0)
            if module.training and isinstance(rate, float) and rate > 0:
                raise ValueError(f"{name}: {attribute.replace('_', ' ')} of {rate:g} is on; call model.eval() first")
    for layer in checkpointed_layers(model):
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                "reentrant activation checkpointing runs no hooks in the forward pass; enable it with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


@contextmanager
def unnoticed(engine: Any, model: PreTrainedModel) -> Iterator[None]:
    """Passes of ``model`` inside the context leave no mark on the ZeRO-3 that gathers its parameters.

    A trace of other passes, by which parameters are gathered ahead, would keep the head and the embedding for a
    backward pass that ends before it reaches them. And blocks of experts would reduce their gradients, zero where there
    is none. ``engine`` may be the model itself, where nothing trains it: what gathers its parameters is found, what
    reduces gradients is the engine's.
    """
    if not hasattr(next(model.parameters()), "ds_id"):
        yield
        return
    from dcr_scale.zero3 import gathered_by, offload_of, untraced, without_leaf_reductions

    optimizer = getattr(engine, "optimizer", None)
    offload = offload_of(model)
    if offload is None:
        raise ValueError("the model's parameters are partitioned, and no DeepSpeed engine runs it: initialise one")
    with without_leaf_reductions(optimizer), gathered_by(offload, untraced(offload.param_coordinator)):
        yield


@contextmanager
def borrowed(model: PreTrainedModel, packed: bool, dtype: torch.dtype) -> Iterator[None]:
    """Frozen, in evaluation mode, with the attention that ``packed`` needs; on leaving, as it was.

    Asserts on leaving that no gradient was touched and that ZeRO-3 holds nothing gathered that it did not before.
    """
    parameters = list(model.parameters())
    device = parameters[0].device
    flags = [parameter.requires_grad for parameter in parameters]
    grads = [None if p.grad is None else (p.grad, p.grad._version) for p in parameters]
    gathered = {id(p) for p in parameters if _gathered(p)}
    modes = [(module, module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    implementation = model.config._attn_implementation
    checkpoints = {layer: layer._gradient_checkpointing_func for layer in checkpointed_layers(model)}
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        model.eval()
        for layer in checkpoints:
            # Only training layers recompute.
            layer.training = True
            layer._gradient_checkpointing_func = partial(_checkpoint_evaluating, layer, checkpoints[layer])
        wanted = _implementation(implementation, packed, device, dtype)
        if wanted != implementation:
            model.set_attn_implementation(wanted)
        yield
    finally:
        for layer, checkpoint in checkpoints.items():
            layer._gradient_checkpointing_func = checkpoint
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
        torch.set_rng_state(random_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)
    for (name, parameter), before in zip(model.named_parameters(), grads, strict=True):
        now = None if parameter.grad is None else (parameter.grad, parameter.grad._version)
        same = (now is None and before is None) or (now and before and now[0] is before[0] and now[1] == before[1])
        assert same, f"the probe touched the gradient of {name}"
    left = [name for name, p in model.named_parameters() if _gathered(p) and id(p) not in gathered]
    assert not left, f"the probe left parameters gathered: {', '.join(left)}"


def _checkpoint_evaluating(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any):
    """Recompute a layer whose own forward pass, both times, finds it in evaluation: some drop where it is not."""

    def evaluating(*args: Any) -> Any:
        layer.training = False
        try:
            return forward(*args)
        finally:  # recomputation ends by an exception, as soon as it has what it needs
            layer.training = True

    return checkpoint(evaluating, *args)


def _gathered(parameter: Any) -> bool:
    """Whether a ZeRO-3 parameter is whole on this rank at the moment, other than for good."""
    if not hasattr(parameter, "ds_id") or parameter.ds_persist:
        return False
    return parameter.ds_status.name != "NOT_AVAILABLE"


def _implementation(current: str, packed: bool, device: torch.device, dtype: torch.dtype) -> str:
    if packed:
        # What the run was told to use stays: another kernel rounds otherwise, and may be what the user avoids.
        return current if current in _OURS else attention.choose("auto", device, dtype)
    return "sdpa" if current in _OURS else current
