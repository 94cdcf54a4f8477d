"""Stages at toy size whose every held, kept and sent byte is counted, to compare plans with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcr_scale.config import load_config


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
        live = stack.enter_context(LiveBytes())
        counts = Counts(world.size, live)
        for patch in counts.patches():
            stack.enter_context(patch)
        run.run()
    return counts.stages


def count_probed(config: str, overrides: list[str]) -> tuple[int, int]:
    """On each rank: bytes held of the whole model beside stage 1's trunk, and the weights' bytes read for both."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.models import verified_loading
    from dcr_scale.pipeline import Run
    from dcr_scale.whole_model import WholeModel

    held, read = [0], [0]
    close, load = WholeModel.close, verified_loading.load_weights

    def closing(whole: WholeModel) -> None:
        held[0] = distinct([getattr(p, "ds_tensor", p.data) for p in whole.model.parameters()])
        close(whole)

    def loading(*args: Any, **named: Any) -> None:
        before = moved()[0]
        load(*args, **named)
        read[0] += moved()[0] - before

    loaded = load_config(config, overrides)
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(WholeModel, "close", closing),
        mock.patch.object(verified_loading, "load_weights", loading),
    ):
        Run(loaded, engines.start(loaded.engine)).run()
    return held[0], read[0]


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes that tensors made inside the context held at once since it was last set to 0.

    Storages are watched, so that it does not matter who frees them: gloo's threads do, which a profiler does not see.
    Files that are mapped are not counted, and neither is what a kernel needs only while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = {
            t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)
        }
        fresh = {key: storage for key, storage in made.items() if key not in given}
        if fresh:
            # A storage's number is given out again after its end.
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            for key, storage in fresh.items():
                self._alive.setdefault(key, (StorageWeakRef(storage), storage.nbytes()))
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


class Counts:
    def __init__(self, world_size: int, live: LiveBytes):
        self.world_size, self.live = world_size, live
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
            if "peak" not in self.stages[-1]:
                self.stages[-1]["peak"] = self.live.peak = 0
            with saved_bytes(engine.module) as saved:
                result = call(engine, *inputs, **named)
            layout, labels = inputs[0].layout, inputs[0].labels
            responses = 0 if labels is None else int(labels.ne(-100).sum())
            self._step["kept"].append((sum(saved.values()), layout.prefix, layout.lengths, responses))
            return result

        def stepping(engine: Engine, loss: float) -> Any:
            result = step(engine, loss)
            self.stages[-1] |= {
                "peak": self.live.peak,
                "held": held_bytes(engine),
                "foreign": foreign(engine.module),
                **self._step,
            }
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
