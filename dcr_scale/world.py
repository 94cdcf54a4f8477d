"""The processes of a run: who this one is, where it computes, and how all of them agree.

Ranks are read from the environment that ``deepspeed``, ``torchrun`` and ``srun`` set, so the same script runs under
each, and alone.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcr_scale.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the others. ``device`` is where its tensors live."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all ranks, in float64. Every rank must call it with as many."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def max(self, *values: float) -> list[float]:
        """The largest of each number over all ranks. Every rank must call it with as many."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def gather(self, value: object) -> list:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def agreed(self, writes: Path | None = None) -> Iterator[None]:
        """Run a block whose failure may strike one rank only; then the same UserError is raised on every rank.

        Without it the other ranks would wait in their next collective for one that has gone. The block itself must
        not hold a collective. ``writes`` names the file or folder that it writes, for the message.
        """
        failure: str | None = None
        try:
            yield
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = str(error) if writes is None else cannot_write(writes, error)
        failures = [text for text in self.gather(failure) if text is not None]
        if failures:
            known_to_all = UserError(failures[0])
            known_to_all.agreed = True
            raise known_to_all


def cannot_write(path: Path, error: OSError) -> str:
    """What to tell the user where a file of the run cannot be written: the disk is full, mostly."""
    return (
        f"{error.filename or path}: cannot be written ({error.strerror or error}); free space there, make it "
        "writable, or set run.dir to another folder"
    )


def from_environment() -> World:
    """Read this process's place from RANK, LOCAL_RANK and WORLD_SIZE (or SLURM's), and pick its device."""

    # SLURM's variables count where srun has started this process: a batch script has most of them as well, and what
    # runs there without srun is alone.
    by_srun = bool(os.environ.get("SLURM_STEP_NUM_TASKS"))

    def number(*names: str, default: int) -> int:
        found = (name for name in names if os.environ.get(name) and (by_srun or not name.startswith("SLURM_")))
        return next((int(os.environ[name]) for name in found), default)

    rank = number("RANK", "SLURM_PROCID", default=0)
    size = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", default=1)
    local_rank = number("LOCAL_RANK", "SLURM_LOCALID", default=0)
    local_size = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", default=size)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return World(rank, size, local_rank, local_size, device)


def complete_environment(world: World) -> None:
    """Set what torch.distributed reads, for a process that no launcher started."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if world.size > 1:
            raise UserError(
                f"this is one of {world.size} ranks but MASTER_ADDR and MASTER_PORT are not set; start with deepspeed, "
                "torchrun, or set both to the first node's"
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("RANK", str(world.rank))
    os.environ.setdefault("WORLD_SIZE", str(world.size))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))


def seed_everything(seed: int | str) -> None:
    """Seed every generator: alike on all ranks where initial LoRA weights are drawn, which must not differ.

    A text seeds by its hash: ``"7 align step 12 rank 3"`` makes a step's dropout a matter of its name, so that a run
    which goes on after an interruption needs no generator's state.
    """
    if isinstance(seed, str):
        seed = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=7).digest(), "little")
    random.seed(seed)
    torch.manual_seed(seed)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this process has held so far: allocated on the GPU, or resident on the CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with how many threads it lends this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_model()}, {torch.get_num_threads()} threads)"


def cpu_model() -> str:
    """What the processor calls itself: ``AMD EPYC``; where it does not say, its architecture."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)", listed.read_text() if listed.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    """For a summary: ``versions`` of the packages that a result depends on, and ``python``'s."""
    packages = ("dcr-scale", "torch", "deepspeed", "transformers", "peft")
    return {
        "versions": {package: metadata.version(package) for package in packages},
        "python": platform.python_version(),
    }
