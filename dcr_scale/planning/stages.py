"""The plan of a run: of each stage what it holds, sends, reads, computes, and how long that takes."""

from __future__ import annotations

import copy
import math
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from dcr_scale.config import Config
from dcr_scale.errors import UserError
from dcr_scale.models import attention
from dcr_scale.models.trunk import build_skeleton, depth
from dcr_scale.planning.activations import Activations, model_activations, trunk_activations
from dcr_scale.planning.arithmetic import Arithmetic, plan_arithmetic
from dcr_scale.planning.disk import Disk, plan_disk
from dcr_scale.planning.finding import FoundModel, find_model
from dcr_scale.planning.gathering import Gathers
from dcr_scale.planning.hardware import GIB, NODE, VIEWS, Device, pass_seconds, update_seconds
from dcr_scale.planning.memory import Memory, plan_memory
from dcr_scale.planning.modules import ModuleList, trunk_modules, whole_modules
from dcr_scale.planning.traffic import Traffic, plan_traffic, step_gathers
from dcr_scale.planning.workload import Assumed, Lengths, Work, align_work, measure_lengths, refine_work
from dcr_scale.refine import check_layer

# What a process holds on a GPU beside tensors: its context and kernels, NCCL's buffers, and what the allocator cannot
# use for being in pieces.
RESERVE = 3 * GIB


@dataclass(frozen=True)
class Cluster:
    """``gpus`` GPUs, in nodes of eight, with ``memory`` bytes each."""

    gpus: int
    memory: float
    device: Device


@dataclass(frozen=True)
class Times:
    """Seconds in the three views of the hardware, the fastest first: of a step, and of the whole stage with its loading
    and export; ``mfu``: model FLOPs by what the GPU could do at its peak."""

    step: tuple[float, float, float]
    stage: tuple[float, float, float]
    mfu: tuple[float, float, float]

    def gpu_hours(self, gpus: int) -> tuple[float, float, float]:
        fast, expected, slow = (seconds * gpus / 3600 for seconds in self.stage)
        return fast, expected, slow


@dataclass(frozen=True)
class StagePlan:
    """One stage on one cluster. ``work`` and all bytes but the disk's are those of the rank that has most to do."""

    name: str
    cluster: Cluster
    modules: ModuleList
    work: Work
    gathers: Gathers
    memory: Memory
    traffic: Traffic
    disk: Disk
    arithmetic: Arithmetic
    times: Times

    @property
    def fits(self) -> bool:
        return self.memory.total + RESERVE <= self.cluster.memory


class Planner:
    """Plans a configuration's stages for clusters of any size; what does not depend on the size is worked out once.

    Raises UserError for what the run would refuse: a layer beyond the model, data that is wrong.
    """

    def __init__(self, config: Config, found: FoundModel, lengths: Lengths, *, on_gpu: bool = True):
        self.config, self.model, self.lengths = copy.deepcopy(config), found, lengths
        self.notes = [f"model: {config.model.path}, {found.origin}", f"data: {lengths.note}"]
        self._choose_layer()
        precision = config.engine.precision
        self.dtype = torch.float32 if precision == "fp32" or (precision == "auto" and not on_gpu) else torch.bfloat16
        asked = config.model.attention
        # flash-attn keeps no more than torch's kernel, which is at hand wherever torch is.
        self.attention = attention.SDPA if asked == "sdpa" or not on_gpu else attention.TORCH_VARLEN
        trust = config.model.trust_remote_code
        skeleton = build_skeleton(found.config, trust_remote_code=trust)
        self.sizes = [parameter.numel() for parameter in skeleton.parameters()]
        self.modules: dict[str, ModuleList] = {}
        if self.config.refine is not None:
            self.modules["refine"] = trunk_modules(found.config, self.config.refine, trust_remote_code=trust)
        if self.config.align is not None:
            self.modules["align"] = whole_modules(found.config, self.config.align, trust_remote_code=trust)
        self._activations: dict[object, Activations] = {}

    @property
    def whole(self) -> int:
        """Parameters of the whole model."""
        return sum(self.sizes)

    def _choose_layer(self) -> None:
        folder, settings = Path(self.config.model.path), self.config.refine
        align = self.config.align
        if align is not None and align.rehearsal.weight and align.rehearsal.layer is not None:
            check_layer(align.rehearsal.layer, self.model.config, folder, "align.rehearsal.layer")
        if settings is None:
            return
        if settings.layer == "auto":
            settings.layer = max(1, round(0.4 * depth(self.model.config)))
            self.notes.append(f"refine.layer is auto: planned for {settings.layer}, 0.4 of the depth")
        check_layer(settings.chosen_layer, self.model.config, folder)

    def plan(self, cluster: Cluster) -> list[StagePlan]:
        """The configuration's stages, in order."""
        return [self._stage(name, cluster) for name in self.modules]

    def _stage(self, name: str, cluster: Cluster) -> StagePlan:
        modules, gpus, engine = self.modules[name], cluster.gpus, self.config.engine
        checkpointing = self.config.model.gradient_checkpointing
        work = self._work(name, gpus)
        micro_steps = len(work.packs)
        gathers = step_gathers(
            modules, engine, world_size=gpus, micro_steps=micro_steps, twice=work.twice, checkpointing=checkpointing
        )
        sizes = {"world_size": gpus, "element_bytes": self.dtype.itemsize}
        memory = plan_memory(
            modules, engine, gathers, self._activations_of(name, work), **sizes,
            probed=self.sizes if self._probed(name) else (),
        )  # fmt: skip
        traffic = plan_traffic(
            modules, engine, gathers, **sizes, micro_steps=micro_steps,
            rows=math.ceil(work.batch / gpus) if name == "refine" else len(work.beside[0]),
            width=self.model.config.get_text_config().hidden_size,
        )  # fmt: skip
        arithmetic = plan_arithmetic(modules, self.model.config, work, checkpointing=checkpointing)
        disk = self._disk(name, work)
        times = self._times(cluster, modules, work, memory, traffic, arithmetic, disk)
        return StagePlan(name, cluster, modules, work, gathers, memory, traffic, disk, arithmetic, times)

    def _work(self, name: str, gpus: int) -> Work:
        if name == "refine":
            assert self.config.refine is not None
            return refine_work(self.lengths, self.config.refine, gpus)
        assert self.config.align is not None
        return align_work(self.lengths, self.config.align, gpus)

    def _activations_of(self, name: str, work: Work) -> Activations:
        largest = work.largest
        own, beside, responses = work.packs[largest], work.beside[largest], work.responses[largest]
        key = (name, own, beside, responses)
        if key not in self._activations:
            # torch describes its grouped products in bf16 alone; in float32 everything is twice as large.
            routed = any(use.kind == "experts" for use in self.modules[name].uses)
            dtype = torch.bfloat16 if routed else self.dtype
            shared: dict[str, Any] = {"prefix": work.prefix, "attention": self.attention, "dtype": dtype}
            model, config = self.config.model, self.model.config
            if name == "refine":
                assert self.config.refine is not None
                found = trunk_activations(
                    config, self.config.refine, model, contrast=own, retained=beside, **shared
                )  # fmt: skip
            else:
                assert self.config.align is not None
                found = model_activations(
                    config, self.config.align, model, examples=[*beside, *own], responses=responses, **shared
                )  # fmt: skip
            scale = self.dtype.itemsize // dtype.itemsize
            self._activations[key] = Activations(*(scale * size for size in astuple(found)))
        return self._activations[key]

    def _disk(self, name: str, work: Work) -> Disk:
        modules, config, states = self.modules[name], self.config, self.config.checkpoint
        lora = name == "align" and config.align is not None and config.align.method == "lora"
        file_dtype = getattr(self.model.config, "dtype", None) or torch.bfloat16
        return plan_disk(
            modules,
            whole=self.whole,
            adapted=modules.adapted if lora else 0,
            export=config.align.lora.export if lora and config.align is not None else "merged",
            file_bytes=torch.empty(0, dtype=file_dtype).element_size(),
            every=states.every or 0,
            keep=states.keep_last + (work.steps // states.keep_every if states.keep_every else 0),
            steps=work.steps,
            probed=self._probed(name),
        )

    def _probed(self, name: str) -> bool:
        """Whether the stage holds the whole model beside its own, for the probe: stage 2's own is the whole."""
        return name == "refine" and bool(self.config.probe.every)

    def _times(
        self,
        cluster: Cluster,
        modules: ModuleList,
        work: Work,
        memory: Memory,
        traffic: Traffic,
        arithmetic: Arithmetic,
        disk: Disk,
    ) -> Times:
        device, gpus = cluster.device, cluster.gpus
        steps, stages, shares = [], [], []
        for view in VIEWS:
            seconds = pass_seconds(
                device, gpus, view,
                flops=arithmetic.device,
                weight_bytes=arithmetic.passes * modules.held * self.dtype.itemsize,
                sent=traffic.total,
                collectives=traffic.collectives,
                modules=arithmetic.passes * len(modules.uses),
            )  # fmt: skip
            seconds += update_seconds(device, view, memory.optimizer + memory.gradients)
            nodes = math.ceil(gpus / NODE)
            files = (disk.read + disk.exported + disk.state * self._saves(work)) / (view.disk * nodes)
            steps.append(seconds)
            stages.append(seconds * work.steps + files)
            shares.append(arithmetic.model / seconds / device.flops)
        return Times(*(tuple(values) for values in (steps, stages, shares)))  # type: ignore[arg-type]

    def _saves(self, work: Work) -> int:
        every = self.config.checkpoint.every
        return (work.steps - 1) // every if every else 0


def make_planner(config: Config, assumed: Assumed | None = None, model_config: Path | None = None) -> Planner:
    """Find the model's configuration and the data's lengths. Raises UserError where either cannot be used."""
    found = find_model(config.model, model_config)
    lengths = measure_lengths(config, found.folder, assumed or Assumed())
    return Planner(config, found, lengths)


def check_cluster(gpus: int, memory: float, assumed: Assumed) -> None:
    """Raise UserError for numbers that no cluster and no data can have."""
    if gpus < 1 or memory <= 0:
        raise UserError(f"{gpus} GPUs of {memory / GIB:g} GiB: both must be above 0")
    if assumed.prefix < 0 or assumed.prompt < 1 or assumed.example <= assumed.prompt:
        raise UserError(
            f"--prefix-tokens {assumed.prefix} --prompt-tokens {assumed.prompt} --example-tokens {assumed.example}: a "
            "prompt has at least one token, and an example more than its prompt"
        )
