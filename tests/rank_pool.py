"""Four processes that tests borrow as ranks, started once per test session.

A rank wants libraries that take many times longer to import than most jobs take on a waiting rank. So the ranks are
forked on first use from a server that has the libraries, keep their process group while the world size stays the same,
and are replaced only when a job hangs or one of them has died.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

MAX_RANKS = 4
# Once a rank has failed, its peers may be waiting for it in a collective: this long, then they are replaced.
GRACE_SECONDS = 5.0
# Imported once for all ranks. None of it starts a thread, which a fork would lose; the project's own modules are not
# among them, for they read the environment that a test sets.
PRELOADED = [
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which its engines import, and which has half of torch.compile
    "transformers.modeling_utils",
    "peft",
    "scipy.stats",
]


class RankFailure(AssertionError):
    """A job raised on some rank, hung or died; the message holds the remote traceback."""


def _join_group(rank: int, world_size: int, store_path: str) -> None:
    import torch.distributed as dist

    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():
        # A job has used it: it keeps copies of the group, which only its own function forgets.
        deepspeed.comm.destroy_process_group()
    elif dist.is_initialized():
        dist.destroy_process_group()
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        # DeepSpeed numbers modules and parameters through a process's life, and compares the numbers between ranks;
        # in an earlier job this rank may have had no part.
        offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        sys.modules["deepspeed.runtime.zero.partition_parameters"].Init.param_id = 0
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600))


def _serve(rank: int, connection: Connection) -> None:
    """Runs jobs until the parent hangs up: (sys.path, environment, world size, store or None, payload)."""
    import torch

    torch.set_num_threads(1)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    while True:
        try:
            path, environment, world_size, store_path, payload = connection.recv()
        except EOFError:
            return
        sys.path[:] = path
        os.environ.update(environment)
        try:
            if store_path is not None:
                _join_group(rank, world_size, store_path)
            function, args = pickle.loads(payload)
            reply = pickle.dumps((True, function(*args)))
        except BaseException:  # SystemExit of a launcher under test must reach the parent, not end the rank
            reply = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(reply)
        # A waiting rank holds nothing of its last job: a production model's layers are gigabytes.
        function = args = payload = reply = None
        gc.collect()
        if trim is not None:
            trim(0)


class RankPool:
    """Runs a function on 1 to 4 gloo ranks; see `run`."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._world_size = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        self._stores = 0

    def run(self, function: Callable[..., Any], *args: Any, world_size: int, timeout: float = 120.0) -> list[Any]:
        """Calls `function(*args)` on each rank of a default gloo group; returns the results in rank order.

        `function` lies at the top level of an importable module, and arguments and results can be pickled.
        RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as a launcher
        would set them.

        Raises RankFailure with the remote traceback when a rank raises, dies, or `timeout` seconds pass. The
        pool can be used again afterwards.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size is {world_size}, the pool has 1 to {MAX_RANKS} ranks")
        payload = pickle.dumps((function, args))
        dead = [f"{process.name} ({process.exitcode})" for process, _ in self._workers if not process.is_alive()]
        if dead:
            # As a rule the machine ran out of memory. That is not this job's failure, and would be every later one's.
            warnings.warn(f"ranks that died between jobs are replaced: {', '.join(dead)}", stacklevel=2)
            self.close()
        if not self._workers:
            self._spawn()
        store_path = None
        if world_size != self._world_size:
            self._stores += 1
            store_path = str(Path(self._folder.name) / f"store_{self._stores}")
            self._port = free_port()
            self._world_size = world_size
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
            }
            self._workers[rank][1].send((sys.path, environment, world_size, store_path, payload))
        return self._collect(world_size, timeout)

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        ranks = {self._workers[rank][1]: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        died = False
        while ranks:
            ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = ranks.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, "the process died without a traceback"
                    died = True
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if not ready:
                break
        if failures or ranks:
            # A group that lost a collective half-way is not used again.
            self._world_size = 0
            if ranks or died:
                self.close()
            report = [f"rank {rank} of {world_size}:\n{text}" for rank, text in sorted(failures.items())]
            report += [f"rank {rank} of {world_size} did not finish and was killed" for rank in sorted(ranks.values())]
            if not failures:
                report.append(f"no rank raised within the {timeout:.0f} s allowed")
            raise RankFailure("\n".join(report))
        return [results[rank] for rank in range(world_size)]

    def _spawn(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        # DeepSpeed reads it when it is imported.
        with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
            forkserver.ensure_running()
        for rank in range(MAX_RANKS):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there), daemon=True, name=f"rank-{rank}")
            process.start()
            there.close()
            self._workers.append((process, here))
        self._world_size = 0

    def close(self) -> None:
        """Ends the ranks; the next `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
        self._world_size = 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
