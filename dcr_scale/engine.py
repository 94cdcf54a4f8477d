"""DeepSpeed ZeRO-3: all that trains or runs under it goes through here.

Its configuration is derived here from :class:`~dcr_scale.config.EngineConfig` and
:class:`~dcr_scale.config.OptimizerConfig`; there is no second file to keep in step.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from dcr_scale import world as world_module
from dcr_scale.build_lock import remove_stale_lock
from dcr_scale.config import EngineConfig, OptimizerConfig
from dcr_scale.errors import UserError
from dcr_scale.models.weights import OwnPart, own_part
from dcr_scale.world import World
from dcr_scale.zero3 import UndefinedWeights, gathered_by, mark_leaves, release, untraced, without_leaf_reductions

log = logging.getLogger(__name__)

# What AdamW knows of a parameter: its float32 master, and the first and second moment of its gradient.
STATES = ("weight", "exp_avg", "exp_avg_sq")


def start(settings: EngineConfig) -> World:
    """Join the other ranks. Call once per process, before anything is built."""
    deepspeed.utils.logging.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 calls old, and every call would say so.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    world = world_module.from_environment()
    world_module.complete_environment(world)
    if world.device.type == "cpu":
        # Another version of ninja takes the build of the collectives for stale and compiles them anew.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        if world.local_rank == 0:
            root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
            for lock in root.glob("**/deepspeed_shm_comm/lock"):
                remove_stale_lock(lock)
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=settings.timeout_minutes),
        verbose=False,
    )
    if world.device.type == "cpu":
        _unname_shared_memory()
    return world


def _unname_shared_memory() -> None:
    """Let the memory of DeepSpeed's collectives on a CPU go with its processes, however they end from here on.

    Each rank makes 66 MiB in ``/dev/shm`` where all ranks are on one machine, and DeepSpeed never removes them. Once
    all ranks have opened all of them nobody needs their names.
    """
    names = [os.environ.get(variable, "") for variable in ("MASTER_ADDR", "MASTER_PORT")]
    name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *names, str(dist.get_rank())])
    dist.barrier()
    Path("/dev/shm", name).unlink(missing_ok=True)


def finish() -> None:
    """Leave the process group, so that no rank prints a warning at exit and another run can start in the process."""
    if dist.is_initialized():
        # DeepSpeed's own, which also forgets the copies of the group that it keeps.
        deepspeed.comm.destroy_process_group()


def compute_dtype(settings: EngineConfig, device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it at speed, else float32, unless the config insists."""
    if settings.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def deepspeed_config(
    settings: EngineConfig, optimizer: OptimizerConfig | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's own configuration: for training, or (``optimizer`` None) for inference over ZeRO-3.

    Micro-batch size and accumulation are 1 because packs are cut to tokens, not rows, and the engine sets the
    accumulation boundary itself.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31 - 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": settings.reduce_bucket,
            "stage3_prefetch_bucket_size": settings.prefetch_bucket,
            "stage3_param_persistence_threshold": settings.persistence_threshold,
            "stage3_model_persistence_threshold": settings.persistence_total,
            "stage3_max_live_parameters": settings.max_live,
            "stage3_max_reuse_distance": settings.max_live,
        },
    }
    if settings.offload_parameters == "cpu":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if optimizer is not None:
        if settings.offload_optimizer != "none":
            config["zero_optimization"]["offload_optimizer"] = {
                "device": settings.offload_optimizer,
                "pin_memory": device.type == "cuda",
                **({"nvme_path": settings.offload_folder} if settings.offload_optimizer == "nvme" else {}),
            }
        config["gradient_clipping"] = optimizer.clip
        # AdamW comes from torch on every device; DeepSpeed's own would be compiled on first use.
        config["zero_allow_untested_optimizer"] = True
        config["zero_force_ds_cpu_optimizer"] = False
        if dtype == torch.bfloat16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def partitioned(settings: EngineConfig, dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Modules built in this context spread each parameter over the ranks at once: no rank ever holds the model.

    The weights are yet to be loaded: each rank keeps its part of its own initial values.
    """
    # The dtype goes in with the configuration: zero.Init's own argument is ignored where fp16 is not supported
    # (DeepSpeed 0.19.8 makes bf16 of any dtype on a CPU).
    return UndefinedWeights(config_dict_or_path=deepspeed_config(settings, None, dtype, device))


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside the context every rank sees these (small) parameters whole. All ranks must enter it."""
    return deepspeed.zero.GatheredParameters(list(parameters))


def learning_rate(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of the update that follows ``step`` applied updates of ``steps`` in all."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return settings.lr * (settings.final + (1.0 - settings.final) * shape[settings.schedule])


@dataclass(frozen=True)
class Update:
    """What one optimiser step did: global gradient norm before clipping, rate used, and whether it was applied."""

    grad_norm: float
    lr: float
    applied: bool


class Engine:
    """A module under ZeRO-3 with AdamW and its schedule.

    Losses passed to :meth:`backward` must be this rank's share of the *sum over ranks*, multiplied by the world
    size: DeepSpeed averages gradients over ranks, and this makes the average the true gradient.
    """

    def __init__(self, module: nn.Module, settings: EngineConfig, optimizer: OptimizerConfig, steps: int, world: World):
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("nothing to train: every parameter is frozen")
        self.settings, self.schedule, self.steps, self.world = settings, optimizer, steps, world
        self.dtype = compute_dtype(settings, world.device)
        self.applied = 0
        self.skipped_in_a_row = 0
        self._forward_coordinator: Any = None
        self._trained: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
        matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
        vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
        groups = [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        mark_leaves(module)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=adamw,
            config=deepspeed_config(settings, optimizer, self.dtype, world.device),
        )

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The module's forward pass, under ZeRO-3."""
        return self._engine(*inputs, **named)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes through the module inside the context are none of training's: in evaluation mode, and unknown to the
        trace by which DeepSpeed gathers parameters ahead. Between updates only; afterwards the module trains on."""
        offload = self._optimizer.parameter_offload
        with (
            without_leaf_reductions(self._optimizer),
            gathered_by(offload, untraced(offload.param_coordinator)),
        ):
            self.train(False)
            try:
                yield
            finally:
                self.train(True)

    @contextmanager
    def forward_only(self, *, training: bool) -> Iterator[None]:
        """Passes inside the context keep no gradients. ``training``: dropout is on, as in the step they belong to.

        They have a trace of their own, by which DeepSpeed gathers parameters ahead: mixed with the other passes'
        neither would hold. Afterwards the module trains on.
        """
        offload = self._optimizer.parameter_offload
        if self._forward_coordinator is None:
            self._forward_coordinator = untraced(offload.param_coordinator)
        with gathered_by(offload, self._forward_coordinator), torch.no_grad():
            self.train(training)
            try:
                yield
            finally:
                self.train(True)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate gradients. ``last`` marks the micro-step after which :meth:`step` follows."""
        self._engine.set_gradient_accumulation_boundary(last)
        # An infinite loss can have finite gradients (a target whose logit is -inf). Made nan, they are discarded.
        self._engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan), scale_wrt_gas=False)

    def step(self, loss: float) -> Update:
        """Clip, update and move the schedule on; a non-finite loss or gradient norm is never applied.

        Raises UserError on every rank where ``engine.non_finite`` says stop, or after too many skipped in a row.
        """
        lr = learning_rate(self.schedule, self.applied, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        # A non-finite gradient makes DeepSpeed's norm invalid, and ZeRO-3 then discards the step by itself.
        self._engine.step()
        applied = not self._optimizer.overflow
        norm = self._engine.get_global_grad_norm() if applied else math.nan
        update = Update(grad_norm=float(norm), lr=lr, applied=applied)
        if applied and math.isfinite(loss):
            self.applied += 1
            self.skipped_in_a_row = 0
        else:
            self._refuse(loss)
        return update

    def _refuse(self, loss: float) -> None:
        self.skipped_in_a_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient's norm is not finite"
        log.warning("step skipped: %s (%d in a row)", what, self.skipped_in_a_row)
        if self.settings.non_finite == "stop":
            raise UserError(
                f"stopped after {self.applied} updates: {what}; lower the learning rate, or set "
                "engine.non_finite=skip to leave such steps out"
            )
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise UserError(
                f"stopped after {self.applied} updates: {self.skipped_in_a_row} steps in a row were not finite "
                f"(engine.max_skipped={self.settings.max_skipped}; last: {what}); lower the learning rate"
            )

    # --- its state, for checkpoints ----------------------------------------------------------------------------

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of the trained parameters."""
        return {name: tuple(parameter.ds_shape) for name, parameter in self._trained.items()}

    def own_states(self, *, filled: bool = False) -> Iterator[tuple[str, str, OwnPart]]:
        """This rank's elements of each trained parameter's master and moments, float32: the parameter's name, which of
        :data:`STATES`, and the elements, to read or, where they are ``filled`` and :meth:`adopt` follows, to write.

        What lives on a disk is in memory while it is its turn.
        """
        groups: dict[int, list[tuple[str, int]]] = {}
        for name, parameter in self._trained.items():
            group, begin, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            groups.setdefault(group, []).append((name, begin))
        for group, members in groups.items():
            with self._in_memory(group, changed=filled) as states:
                for name, begin in members:
                    # What AdamW has not met yet has moments of zero, and so has the padding past the parameter's end.
                    part = own_part(self._trained[name])
                    for key in STATES:
                        values = states[key].detach()[begin : begin + part.values.numel()]
                        yield name, key, OwnPart(part.start, values)

    @contextmanager
    def _in_memory(self, group: int, *, changed: bool = False) -> Iterator[dict[str, Tensor]]:
        """Masters and moments of one of DeepSpeed's groups of parameters, each flat, read from the disk where they live
        there, and, if ``changed``, written back."""
        optimizer = self._optimizer
        on_disk = optimizer._swappable_optimizer_subgroup(group)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        master = optimizer.fp32_partitioned_groups_flat[group]
        state = optimizer.optimizer.state[master]
        if not state:
            # torch makes them at its first step; a checkpoint may be wanted, or read, before it.
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state |= {key: torch.zeros_like(master) for key in STATES[1:]}
            changed = True
        try:
            yield {"weight": master, **state}
        finally:
            if on_disk and changed:
                optimizer._optimizer_states_and_gradient_swap_out(group)
            elif on_disk:
                optimizer._release_swap_buffers(group)

    @torch.no_grad()
    def adopt(self, applied: int) -> None:
        """Go on from masters and moments that were filled in, after so many applied updates. Every rank calls it."""
        self.applied = applied
        # Passes before, such as the packing check's, have left parameters gathered, and would be used as they are.
        self._optimizer._partition_all_parameters()
        for group in range(len(self._optimizer.fp16_groups)):
            with self._in_memory(group) as states:
                states["step"].fill_(applied)
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        small = self._optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)

    def close(self) -> None:
        """Release the engine's buffers and hooks. The module's partitions stay, for as long as somebody holds it."""
        release(self._engine)


def inference_engine(module: nn.Module, settings: EngineConfig, world: World) -> nn.Module:
    """Run a partitioned module's forward passes under ZeRO-3, without an optimiser."""
    dtype = compute_dtype(settings, world.device)
    mark_leaves(module)
    engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config(settings, None, dtype, world.device))
    engine.eval()
    return engine
