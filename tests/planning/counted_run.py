"""Stages at toy size whose every held, kept and sent byte is counted, to compare plans with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from dcr_scale.config import load_config

# Names what a stage does in the profile, with the stage's number.
_MARK = "counted stage "


def count_run(config: str, overrides: list[str]) -> list[dict[str, Any]]:
    """On each rank: a run, and of each of its stages the bytes. Those of a step are the last step's.

    ``held`` by part after the update, ``gathered`` elements at most, ``gathers`` how many, ``foreign`` the parameters
    that ZeRO-3 gathers for modules other than their own, by name, ``sent`` by collectives in the step, ``kept`` by
    autograd in each of its forward passes together with the pack's layout, ``reduced`` elements in the largest copy
    for a reduction; ``loaded``, ``copied`` and ``exported`` from and to files, weights alone. ``peak``: of all tensors'
    memory at once, from the stage's first pass to its last update.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.pipeline import Run

    loaded = load_config(config, overrides)
    with mock.patch.object(torch.cuda, "is_available", lambda: False), ExitStack() as stack:
        world = engines.start(loaded.engine)
        run = Run(loaded, world)  # before anything is counted: it reads the model's configuration
        counts = Counts(world.size)
        for patch in counts.patches():
            stack.enter_context(patch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            run.run()
    for stage, peak in zip(counts.stages, peaks(profiler), strict=True):
        stage["peak"] = peak
    return counts.stages


def peaks(profiler: profile) -> list[int]:
    """Of each stage, the most that tensors held from its first pass to its last update, what lay there before included.

    The allocator reports every block, DeepSpeed's and the backward pass's too; files that are mapped are no blocks.
    """
    waiting, events = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while waiting:
        event = waiting.pop()
        # Gloo copies what it reduces, which NCCL does not, and the plan is for NCCL.
        waiting += event.children if not event.name.startswith("c10d::") else []
        events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    # From a mark's first moment to the last one's end.
    spans: dict[str, tuple[int, int]] = {}
    for event in events:
        if event.name.startswith(_MARK):
            begin, _ = spans.get(event.name, (event.start_time_ns, 0))
            spans[event.name] = begin, event.end_time_ns
    # Blocks of this run alone: the allocator's own total goes on from one run of a process to the next.
    live: dict[int, int] = {}
    held, totals = 0, []
    for event in events:
        if event.tag == _EventType.Allocation:
            block, size = event.extra_fields.ptr, max(0, event.extra_fields.alloc_size)
            # Threads of the collectives free blocks unseen: what is given out again was one of those.
            held += size - live.pop(block, 0)
            live[block] = size
            totals.append((event.start_time_ns, held))
    return [max(total for when, total in totals if begin <= when <= end) for begin, end in spans.values()]


class Counts:
    def __init__(self, world_size: int):
        self.world_size = world_size
        self.stages: list[dict[str, Any]] = []
        self._fresh()

    def patches(self) -> Iterator[Any]:
        import deepspeed.runtime.zero.stage3 as stage3
        from deepspeed.comm.torch import TorchBackend
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        from dcr_kernels.contrastive import exchange
        from dcr_scale import pipeline
        from dcr_scale.engine import Engine
        from dcr_scale.models import verified_loading

        others = self.world_size - 1

        def sending(function: Callable, part: Callable[..., torch.Tensor]) -> Callable:
            """Count what goes to the other ranks: the part this one contributes to each, or gives away."""

            def counted(*args: Any, **named: Any) -> Any:
                tensor = part(*args, **named)
                self._step["sent"] += tensor.numel() * tensor.element_size() * others
                return function(*args, **named)

            return counted

        def own_part(_: Any, *args: Any, **named: Any) -> torch.Tensor:
            tensors = [value for value in [*args, *named.values()] if isinstance(value, torch.Tensor)]
            return min(tensors, key=lambda tensor: tensor.numel())

        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            yield mock.patch.object(TorchBackend, name, sending(getattr(TorchBackend, name), own_part))
        yield mock.patch.object(exchange, "all_gather", sending(exchange.all_gather, lambda out, own, **_: own))

        reduce = stage3.reduce_scatter_coalesced

        def reducing(tensors: list[torch.Tensor], *args: Any, **named: Any) -> Any:
            if len(tensors) > 1:
                self._step["reduced"] = max(self._step["reduced"], sum(tensor.numel() for tensor in tensors))
            return reduce(tensors, *args, **named)

        yield mock.patch.object(stage3, "reduce_scatter_coalesced", reducing)

        fetch_name = "_PartitionedParameterCoordinator__all_gather_params_"
        fetch = getattr(PartitionedParameterCoordinator, fetch_name)
        modules: list[torch.nn.Module] = []

        def fetching(coordinator: Any, fetched: Any, *args: Any, **named: Any) -> Any:
            self._step["gathers"] += any(p.ds_status.name == "NOT_AVAILABLE" for p in fetched)
            result = fetch(coordinator, fetched, *args, **named)
            there = sum(
                p.ds_numel
                for p in (p for module in modules for p in module.parameters())
                if p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist
            )
            self._step["gathered"] = max(self._step["gathered"], there)
            return result

        yield mock.patch.object(PartitionedParameterCoordinator, fetch_name, fetching)

        call, step = Engine.__call__, Engine.step

        def calling(engine: Engine, *inputs: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return call(engine, *inputs, **named)
            modules[:] = [engine.module]
            with saved_bytes(engine.module) as saved, record_function(f"{_MARK}{len(self.stages)}"):
                result = call(engine, *inputs, **named)
            layout, labels = inputs[0].layout, inputs[0].labels
            responses = 0 if labels is None else int(labels.ne(-100).sum())
            self._step["kept"].append((sum(saved.values()), layout.prefix, layout.lengths, responses))
            return result

        def stepping(engine: Engine, loss: float) -> Any:
            with record_function(f"{_MARK}{len(self.stages)}"):
                result = step(engine, loss)
            self.stages[-1] |= {"held": held_bytes(engine), "foreign": foreign(engine.module), **self._step}
            modules.clear()  # a list that outlives the stage would keep it alive
            self._fresh()
            return result

        yield mock.patch.object(Engine, "__call__", calling)
        yield mock.patch.object(Engine, "step", stepping)
        load, export = verified_loading.load_weights, pipeline.export_checkpoint

        def loading(*args: Any, **named: Any) -> None:
            before = moved()
            load(*args, **named)
            self.stages.append({"loaded": moved()[0] - before[0]})

        def exporting(folder: Path, *args: Any, **named: Any) -> None:
            before = moved()
            export(folder, *args, **named)
            read, written = (after - earlier for after, earlier in zip(moved(), before, strict=True))
            # The first rank copies and writes what lies beside the weights.
            beside = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".safetensors")
            own = beside if torch.distributed.get_rank() == 0 else 0
            self.stages[-1] |= {"copied": max(0, read - own), "exported": written - own}

        yield mock.patch.object(verified_loading, "load_weights", loading)
        yield mock.patch.object(pipeline, "export_checkpoint", exporting)

    def _fresh(self) -> None:
        self._step = {"sent": 0, "reduced": 0, "gathered": 0, "gathers": 0, "kept": []}


def moved() -> tuple[int, int]:
    """Bytes this process has read and written by system calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def held_bytes(engine: Any) -> dict[str, int]:
    """What DeepSpeed holds between two steps, by part; a storage counts once."""
    optimizer = engine._optimizer
    parameters = list(engine.module.parameters())
    states = optimizer.optimizer.state.values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
    return {
        "parameters": distinct([p.ds_tensor for p in parameters] + [p.data for p in parameters if p.ds_persist]),
        "gradients": distinct([optimizer.grad_partitions_flat_buffer]),
        "optimizer": distinct([*optimizer.fp32_partitioned_groups_flat, *moments]),
        "buckets": distinct([bucket.buffer for bucket in optimizer.ipg_buckets.values()]),
    }


def foreign(module: torch.nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)] for inner in module.modules() for _, p in inner.ds_external_parameters()}


def distinct(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def saved_bytes(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Sizes of the storages that autograd saves, but for weights, which ZeRO-3 may have gathered in the meantime."""
    sizes: dict[int, int] = {}
    held: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weights = {p.data.untyped_storage()._cdata for p in module.parameters()}
        weights |= {p.ds_tensor.untyped_storage()._cdata for p in module.parameters()}
        if storage._cdata not in weights and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
