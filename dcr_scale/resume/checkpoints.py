"""A stage's checkpoints: written whole or not at all, the newest sound one found again, the older ones removed.

``<run>/checkpoints/<stage>-<step>/`` holds ``training_state.safetensors`` and ``state.json``. A checkpoint is built as
``<stage>-<step>.partial`` and renamed when every rank's bytes are durable, so the name itself is the completion mark.
The newest is the one of the highest step: no clock decides.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcr_scale.config import CheckpointConfig
from dcr_scale.engine import Engine
from dcr_scale.errors import Preempted, UserError
from dcr_scale.models import disk
from dcr_scale.resume import training_state
from dcr_scale.resume.status import Status
from dcr_scale.resume.stop import StopRequest
from dcr_scale.runlog import RunLog, duration
from dcr_scale.world import World

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
FORMAT = 1
_NAME = re.compile(r"(?P<stage>\w+)-(?P<step>\d+)")
# DeepSpeed's launcher kills a rank so long after it has told it to stop.
_LAUNCHER_PATIENCE_SECONDS = 30.0


class StageCheckpoints:
    """Saves one stage of one run, and takes it up again.

    Args:
        folder: the run's.
        recorded_before: bytes of metrics at the stage's begin.
        stop: whether the run has been told to stop.
        shared: whether all ranks see the same folder; where they do not, nothing is saved.
    """

    def __init__(
        self,
        stage: str,
        settings: CheckpointConfig,
        folder: Path,
        runlog: RunLog,
        recorded_before: int,
        stop: StopRequest,
        status: Status,
        world: World,
        *,
        shared: bool,
    ):
        self.stage, self.settings, self.folder = stage, settings, folder / FOLDER
        self.runlog, self.recorded_before = runlog, recorded_before
        self.stop, self.status, self.world, self.shared = stop, status, world, shared
        self.began = time.perf_counter()
        self.earlier_seconds = 0.0
        self._warned = False

    # --- taken up again ----------------------------------------------------------------------------------------

    def resume(self, engine: Engine) -> dict[str, Any] | None:
        """Put the engine where the newest sound checkpoint left it; the stage's own state as it was saved, or None
        where there is none to go on from.

        Every rank calls it. Raises the same UserError on all where checkpoints are there and none can be used.
        """
        found = self._complete()
        for path in reversed(found):
            state = self._restore(engine, path)
            if state is not None:
                return state
        if found:
            raise UserError(
                f"{self.folder}: none of the checkpoints of {self.stage} can be used; --fresh begins the run anew"
            )
        self.runlog.rewind(self.recorded_before)
        return None

    def _complete(self) -> list[Path]:
        """Complete checkpoints of the stage, by step, as rank 0 sees them. What a killed run left half done goes."""
        names: list[str] = []
        with self.world.agreed(self.folder):
            if self.world.first and self.folder.is_dir():
                for path in self.folder.glob("*.partial"):
                    shutil.rmtree(path)
                names = [path.name for path in self.folder.iterdir() if self._step_of(path) is not None]
        names = self.world.gather(names)[0]
        return sorted((self.folder / name for name in names), key=lambda path: self._step_of(path) or 0)

    def _restore(self, engine: Engine, path: Path) -> dict[str, Any] | None:
        state: dict[str, Any] | None = None
        with self.world.agreed():
            if self.world.first:
                state = _read_state(path)
        # The first rank's word counts: ranks that went different ways would wait for one another.
        state = self.world.gather(state)[0]
        if state is None:
            log.warning("%s: has no readable state.json, and is left out", path)
            return None
        damaged: list[str] = []
        try:
            sums = training_state.read_own(engine, path, self.world)
            damaged = [
                f"{name} is not as it was saved"
                for name, value in state["checksums"].items()
                if sums.get(name) != value
            ]
        except UserError as error:
            damaged = [str(error)]
        if damaged:
            log.warning("%s: cannot be used (%s), and is left out", path, damaged[0])
            return None
        engine.adopt(state["applied"])
        engine.skipped_in_a_row = state["skipped_in_a_row"]
        self.earlier_seconds = state["seconds"]
        self.runlog.rewind(state["metrics_bytes"])
        ranks = "" if state["world_size"] == self.world.size else f", with {self.world.size} ranks instead of"
        ranks += f" {state['world_size']}" if ranks else ""
        log.info("%s goes on after step %d%s (%s)", self.stage, state["step"], ranks, path)
        return state["own"]

    # --- saved -------------------------------------------------------------------------------------------------

    def after_step(self, engine: Engine, step: int, own: Callable[[], dict[str, Any]]) -> None:
        """Save where a checkpoint is due, and stop where the run has been told to.

        Every rank calls it after every step but a stage's last. ``own`` gives what the stage itself must know to go on
        after ``step``, as JSON can hold it. Raises Preempted on all ranks once everything is saved, or where there is
        nowhere to save it.
        """
        reason = self.stop.requested(self.world)
        if reason and not self.shared:
            raise Preempted(
                f"{reason}: ranks share no folder, so nothing is saved of stage {self.stage}; the same command begins "
                "it anew"
            )
        due = _every(self.settings.every, step)
        if due or reason:
            self._save(engine, step, own())
        if reason:
            raise Preempted(f"{reason}: saved after step {step} of stage {self.stage}; the same command goes on there")

    def discard(self) -> None:
        """The stage is done and exported: its checkpoints go, but for those kept for good."""
        with self.world.agreed(self.folder):
            if self.world.first and self.folder.is_dir():
                for path in list(self.folder.iterdir()):
                    step = self._step_of(path)
                    if step is not None and not self._kept_for_good(step):
                        shutil.rmtree(path)
                if not any(self.folder.iterdir()):
                    self.folder.rmdir()

    @property
    def seconds(self) -> float:
        """How long the stage has taken so far, interrupted runs before this one included."""
        return self.earlier_seconds + time.perf_counter() - self.began

    def _save(self, engine: Engine, step: int, own: dict[str, Any]) -> None:
        began = time.perf_counter()
        path = self.folder / f"{self.stage}-{step:08d}"
        partial = path.with_name(path.name + ".partial")
        try:
            with self.world.agreed(partial):
                if self.world.first:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                    training_state.lay_out(engine, partial / training_state.FILE)
            checksums = training_state.write_own(engine, partial, self.world)
            state = {
                "format": FORMAT,
                "stage": self.stage,
                "step": step,
                "applied": engine.applied,
                "skipped_in_a_row": engine.skipped_in_a_row,
                "world_size": self.world.size,
                "seconds": round(self.seconds, 1),
                "metrics_bytes": self.runlog.size,
                "own": own,
                "checksums": checksums,
            }
            with self.world.agreed(partial):
                if self.world.first:
                    (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
                    disk.sync(partial / "state.json")
                    disk.sync(partial)
                    # Left by a checkpoint of the same step that was found damaged.
                    shutil.rmtree(path, ignore_errors=True)
                    os.rename(partial, path)
                    disk.sync(self.folder)
                    self._prune(step)
        except UserError:
            if self.world.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        seconds = time.perf_counter() - began
        self.status.write("running", stage=self.stage, step=step, checkpoint=str(path))
        log.info("saved %s (%s)", path, duration(seconds))
        if seconds > _LAUNCHER_PATIENCE_SECONDS and not self._warned:
            self._warned = True
            log.warning(
                "a checkpoint takes %s: more than the %.0f s that launchers leave a rank which they stop, and then the "
                "one before counts; have the job told earlier (docs/launching.md)",
                duration(seconds), _LAUNCHER_PATIENCE_SECONDS,
            )  # fmt: skip

    def _prune(self, step: int) -> None:
        """Remove the oldest up to this step; later ones are what a run left that was taken up before them."""
        mine = sorted((found, path) for path in self.folder.iterdir() if (found := self._step_of(path)) is not None)
        for found, path in mine:
            if found > step:
                shutil.rmtree(path)
        kept = [entry for entry in mine if entry[0] <= step]
        for found, path in kept[: -self.settings.keep_last]:
            if not self._kept_for_good(found):
                shutil.rmtree(path)

    def _kept_for_good(self, step: int) -> bool:
        return _every(self.settings.keep_every, step)

    def _step_of(self, path: Path) -> int | None:
        """The step of one of this stage's complete checkpoints; None for anything else."""
        found = _NAME.fullmatch(path.name)
        return int(found["step"]) if found is not None and found["stage"] == self.stage else None


def _every(count: int | None, step: int) -> bool:
    """Whether ``step`` is one of every so many; None or 0 is never."""
    return count is not None and count > 0 and step % count == 0


def _read_state(path: Path) -> dict[str, Any] | None:
    """``state.json``, None where it is missing or damaged. Raises UserError for one of a later format."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        written = int(state["format"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if written > FORMAT:
        raise UserError(
            f"{path}: was written by a newer version of dcr-scale (format {written}, this one reads {FORMAT}); "
            "install that version"
        )
    return state
