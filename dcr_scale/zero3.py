"""What DeepSpeed 0.19.8's ZeRO-3 does otherwise than training here needs it, and how it is brought round.

All of it reaches into DeepSpeed's own parts, and none of it is needed elsewhere than around an engine.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import deepspeed
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
from torch import nn


class UndefinedWeights(deepspeed.zero.Init):
    """As zero.Init, but rank 0 does not send every parameter to the others before it is cut, and only parameters
    change their dtype.

    zero.Init would give its dtype to all that ``torch.arange`` and its like return meanwhile. Rotary frequencies, which
    no checkpoint holds, would be computed and kept in bf16.
    """

    def __init__(self, **settings: Any):
        super().__init__(tensor_overrides=[deepspeed.zero.DeepSpeedTensorOverride.device], **settings)

    def _zero_init_param(self, param: Any) -> None:
        param.data = param.data.to(self.dtype)
        self._convert_to_deepspeed_param(param)
        param.partition()


def untraced(coordinator: Any) -> Any:
    """A copy of what gathers ZeRO-3's parameters that knows no order of modules yet, and shares no record of one."""
    copied = copy.copy(coordinator)
    if copied.is_invalid_trace():
        copied._clear_trace_structures()
    else:
        copied._invalidate_trace()
    return copied


@contextmanager
def gathered_by(offload: Any, coordinator: Any) -> Iterator[None]:
    """Passes inside the context have their parameters gathered by ``coordinator``, in place of the usual one."""
    usual = offload.param_coordinator
    offload.param_coordinator = coordinator
    try:
        yield
    finally:
        # Modules whose inputs need no gradient wait for a hook that never comes.
        coordinator.release_backward_leftovers()
        offload.param_coordinator = usual


def offload_of(module: nn.Module) -> Any:
    """What gathers the parameters of a module that an engine has taken over, alone or within a larger one; None where
    none has. The module's hooks alone know it."""
    for hook in module._forward_pre_hooks.values():
        # Others' hooks may be no functions, and have no closure.
        for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
            with suppress(ValueError):  # a cell that is empty
                if isinstance(cell.cell_contents, parameter_offload.DeepSpeedZeRoOffload):
                    return cell.cell_contents
    return None


@contextmanager
def without_leaf_reductions(optimizer: Any) -> Iterator[None]:
    """Backward passes inside the context reduce no gradients of leaf modules, zero as they are where nothing trains."""
    reductions = [(hook.hooks_dict_ref(), hook.id) for hook in getattr(optimizer, "_leaf_module_hooks", ())]
    before = [(hooks, dict(hooks)) for hooks, _ in reductions]
    for hooks, number in reductions:
        hooks.pop(number, None)  # a context within another finds it gone
    try:
        yield
    finally:
        for hooks, all_of_them in before:
            hooks.clear()
            hooks.update(all_of_them)


def mark_leaves(module: nn.Module) -> None:
    """Have ZeRO-3 gather a block of experts at once where each expert is a module.

    Tokens take ranks through different experts, and gathering one by one they would wait for each other for ever.
    Experts that transformers fuses into 3-D parameters are one module as they are. The blocks that DeepSpeed marks by
    itself, when it takes a module over, are marked here already: plans are made without that.
    """
    apply_zero_leaf_module_config(module, DeepSpeedZeroLeafModuleConfig())
    for block in module.modules():
        if any("expert" in name and isinstance(child, nn.ModuleList) for name, child in block.named_children()):
            deepspeed.utils.set_z3_leaf_module(block, True)


def release(engine: Any) -> None:
    """Take a DeepSpeed engine's hooks off its module, and let both go when nothing else holds them."""
    engine.destroy()
    # DeepSpeed 0.19.8 never takes a module that it has hooked off this list, nor those in which a recomputed forward
    # pass broke off, and a cache on a method, which NVTX's decorator hides, keeps modules too. With them go masters and
    # moments: the next stage would find no room.
    own = {id(module) for module in engine.module.modules()}
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if id(module) not in own]
    wrapped = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for function in (wrapped, *(cell.cell_contents for cell in wrapped.__closure__ or ())):
        if hasattr(function, "cache_clear"):
            function.cache_clear()
