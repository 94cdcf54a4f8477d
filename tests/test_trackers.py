"""Trackers get every number of a run, under one name a stage; their packages are stand-ins."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from dcr_scale.config import LogConfig
from dcr_scale.runlog import Trackers


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list:
    """What reached either tracker, in order."""
    seen: list = []

    class Run:
        def log(self, values: dict) -> None:
            seen.append(values)

        def finish(self) -> None:
            seen.append("finished")

    class SummaryWriter:
        def __init__(self, folder: str):
            seen.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            seen.append("closed")

    for name, contents in {
        "wandb": {"init": lambda **settings: Run()},
        "tensorboard": {},
        "torch.utils.tensorboard": {"SummaryWriter": SummaryWriter},
    }.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_each_tracker_gets_every_number_and_is_closed(tmp_path: Path, logged: list) -> None:
    trackers = Trackers(LogConfig(trackers=["tensorboard", "wandb"]), tmp_path, "run", {}, "id")
    trackers.log("refine", 3, {"loss": 0.5})
    trackers.close()
    assert logged == [
        str(tmp_path / "tensorboard"),
        ("refine/loss", 0.5, 3),
        {"refine/step": 3, "refine/loss": 0.5},
        "closed",
        "finished",
    ]


def test_no_tracker_is_touched_that_was_not_named(tmp_path: Path, logged: list) -> None:
    trackers = Trackers(LogConfig(), tmp_path, "run", {}, "id")
    trackers.log("refine", 3, {"loss": 0.5})
    trackers.close()
    assert logged == []
