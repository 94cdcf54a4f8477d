"""Runs that are interrupted where a test says, in this process, and what two runs must have in common."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from dcr_scale.runlog import RunLog

# What a clock decides, or when and where a process ran.
CLOCKS = {"tokens_per_second", "memory_gib"}
UNLIKE = {"seconds", "memory_gib", "peak_memory_gib", "world_size"}


@contextmanager
def told_to_stop(stage: str, step: int, number: int = signal.SIGUSR1) -> Iterator[None]:
    """This process gets a signal while it records that step of that stage, or, on other ranks than the first, while
    the first one does."""
    record, record_step = RunLog.record, RunLog.step

    def strike(of_stage: str, of_step: int) -> None:
        if (of_stage, of_step) == (stage, step):
            os.kill(os.getpid(), number)

    def recording(self: RunLog, of_stage: str, of_step: int, values: dict[str, Any]) -> None:
        record(self, of_stage, of_step, values)
        strike(of_stage, of_step)

    def recording_step(self: RunLog, of_stage: str, of_step: int, steps: int, **values: Any) -> None:
        record_step(self, of_stage, of_step, steps, **values)
        if not self.world.first:
            strike(of_stage, of_step)

    with mock.patch.multiple(RunLog, record=recording, step=recording_step):
        yield


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics, without the clock's."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves and that must not depend on whether it was interrupted: bytes of the checkpoints and
    looks, metrics, and what the summary says."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("refined", "aligned", "look")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {**files, "metrics": metrics(folder), "summary": {k: v for k, v in summary.items() if k not in UNLIKE}}
