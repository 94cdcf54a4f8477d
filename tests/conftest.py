"""Fixtures every test folder shares."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from rank_pool import RankPool, free_port

# Kernels run under Triton's interpreter, GPU or not. It is chosen when their modules are first imported, by whichever
# test imports them.
os.environ["TRITON_INTERPRET"] = "1"

# Two cores, up to four ranks beside this process: more threads only get in each other's way.
torch.set_num_threads(1)

# DeepSpeed's collectives are built with the environment's ninja: another version's build is stale to it, for minutes.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# A file of DeepSpeed's takes up to 1.6 GB to compile, beside all ranks; ninja takes more at once than there are cores.
os.environ.setdefault("MAX_JOBS", "2")

# The same examples on every machine and in every run; `--hypothesis-profile=search` draws new ones, and more of them.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=1000, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """`ranks.run(function, *args, world_size=W)`: the function's results on W gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the only rank of a run, on the CPU; what the run changes in it is put back afterwards."""
    from transformers.utils import logging as transformers_logging

    # As one of as many local ranks as there are cores, it takes one thread.
    cores = len(os.sched_getaffinity(0))
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": cores, "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root, ours = logging.getLogger(), logging.getLogger("dcr_scale")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    verbosity = transformers_logging.get_verbosity()
    yield
    from dcr_scale import engine

    engine.finish()
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)
    transformers_logging.set_verbosity(verbosity)
    torch.set_num_threads(1)
