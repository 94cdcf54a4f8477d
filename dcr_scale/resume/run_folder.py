"""A run's folder while a job works in it: locked, its progress taken up, its end said in ``status.json``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dcr_scale.config import Config
from dcr_scale.errors import OutOfMemory, Preempted, UserError
from dcr_scale.models.phases import Phases
from dcr_scale.resume.checkpoints import FOLDER, StageCheckpoints
from dcr_scale.resume.progress import Progress
from dcr_scale.resume.run_lock import RunLock
from dcr_scale.resume.status import Status
from dcr_scale.resume.stop import StopRequest
from dcr_scale.runlog import RunLog
from dcr_scale.world import World

log = logging.getLogger(__name__)


class Share(NamedTuple):
    """What one rank runs in a usual step of a stage: tokens of all its sequences, and of the longest that may be drawn,
    which no setting divides."""

    tokens: int
    longest: int


class RunFolder:
    """Opened by :meth:`held`, on every rank.

    Attributes:
        shares: by stage, what a step gives to a rank; a run that runs out of memory then knows what would be less.
        answered: prompts that a look, or the part before the stages, has a rank answer, for the same purpose.
        progress: which parts of the run are done.
        status: what ``status.json`` says.
        runlog: the run's metrics.
        shared: whether all ranks see the same folder.
    """

    def __init__(self, config: Config, world: World, stop: StopRequest):
        self.path, self.config, self.world, self.stop = config.run.folder, config, world, stop
        self.shares: dict[str, Share] = {}
        self.answered = 0
        self.part = "start"

    @contextmanager
    def held(
        self, asked: dict[str, Any], about: Callable[[], dict[str, Any]], *, fresh: bool, accept_changes: bool
    ) -> Iterator[Progress]:
        """Work in the folder, alone.

        Args:
            asked: the configuration as a tree, for the trackers.
            about: what the run is made by (:meth:`Progress.open`), asked of the first rank.

        Raises UserError on all ranks where another job is in it, or another run's progress, or where checkpoints are to
        be written and ranks do not share the folder; OutOfMemory, on one rank, with the settings that help, where the
        block runs out of memory.
        """
        lock = RunLock(self.path, self.world)
        self.status = Status(self.path, self.world.rank, self.world.size)
        try:
            self.status.begin(self.world)
            self.shared = self._is_shared()
            with self.world.agreed():
                own = about() if self.world.first else {}
            self.progress = Progress.open(self.path, own, self.world, fresh=fresh, accept_changes=accept_changes)
            self.progress.write()
            self.runlog = RunLog(self.config.log, self.path, self.config.run.name, asked, self.world, self.progress.id)
            yield self.progress
            self.status.write("finished", stage="summary", reason="")
        except Preempted as stopped:
            self.status.write("preempted", reason=str(stopped))
            raise
        except torch.OutOfMemoryError as error:
            advised = OutOfMemory(f"rank {self.world.rank} ran out of memory in {self.part}: {self._helps()}\n{error}")
            self.status.fail(str(advised))
            raise advised from None
        except BaseException as error:
            self.status.fail(str(error) if isinstance(error, UserError) else f"rank {self.world.rank}: {error!r}")
            raise
        finally:
            lock.release()

    def begin(self, part: str) -> None:
        """A part of the run begins that leaves no checkpoints: what an interrupted one recorded of it goes."""
        self._enter(part)
        self.runlog.rewind(self._recorded_before)

    def begin_stage(self, stage: str) -> StageCheckpoints:
        """A part begins that may go on in its middle."""
        self._enter(stage)
        return StageCheckpoints(
            stage, self.config.checkpoint, self.path, self.runlog, self._recorded_before,
            self.stop, self.status, self.world, shared=self.shared,
        )  # fmt: skip

    def _is_shared(self) -> bool:
        """Raises UserError on all ranks where it is not and checkpoints need it: all ranks write into one file."""
        phases = Phases(self.path / FOLDER, self.world)
        phases.find_writers()
        shared = len(phases.disks) == 1
        with self.world.agreed():
            if not shared and self.config.checkpoint.every:
                ranks = ", ".join(map(str, phases.disks))
                raise UserError(
                    f"{self.path}: ranks {ranks} each have a disk of their own there, and checkpoints need one that "
                    "all ranks share; set run.dir to a folder on a file system that all ranks share, or "
                    "checkpoint.every=null"
                )
        if not shared:
            log.warning("%s: ranks share no disk there; a stage that is interrupted begins anew", self.path)
        return shared

    def _enter(self, part: str) -> None:
        self.part = part
        self.status.write("running", stage=part, step=0, reason="")

    @property
    def _recorded_before(self) -> int:
        """Bytes of metrics that finished parts have left."""
        return self.progress.kept.get("metrics_bytes", 0)

    def finish(self, part: str, kept: dict[str, Any], checkpoints: StageCheckpoints | None = None) -> None:
        """A part is done, and its checkpoints are needed no more; ``kept`` is what later parts must know.

        Raises Preempted on all ranks where the run has been told to stop.
        """
        self.progress.finish(part, {**kept, "metrics_bytes": self.runlog.size})
        if checkpoints is not None:
            checkpoints.discard()
        reason = self.stop.requested(self.world)
        if reason is not None:
            raise Preempted(f"{reason}: {part} is done; the same command goes on there")

    def _helps(self) -> str:
        """The three settings that save most memory in the part that ran out of it, each less than what is in use."""
        config, helps = self.config, []
        if self.part.startswith("look") or self.part == "answers":
            look = config.look
            if look.partitioned != "yes":
                helps.append("look.partitioned=yes")
            limit = ("data.answer_tokens", config.data.answer_tokens)
            if self.part != "answers":
                limit = ("look.max_new_tokens", look.max_new_tokens)
            used = dict([("look.batch_size", min(look.batch_size, self.answered)), limit])
            helps += [f"{key}={count // 2}" for key, count in used.items() if count > 1]
        else:
            # What is left measures, or writes what stage 2 has trained.
            key = self.part if self.part in ("refine", "align") else "probe"
            tokens = self._fewer_tokens(key)
            if tokens is not None:
                helps.append(f"{key}.micro_batch_tokens={tokens}")
            if not config.model.gradient_checkpointing:
                helps.append("model.gradient_checkpointing=true")
            if config.engine.offload_optimizer == "none":
                helps.append("engine.offload_optimizer=cpu")
            if config.engine.offload_parameters == "none":
                helps.append("engine.offload_parameters=cpu")
        more = "or more GPUs" if helps else "more GPUs"
        return ", ".join([*helps[:3], more]) + "; launchers/plan.py tells how many"

    def _fewer_tokens(self, key: str) -> int | None:
        """Half the tokens that a pass takes now, or the fewest that are allowed; None where no fewer can be had."""
        settings, share = getattr(self.config, key), self.shares.get(key)
        limits = [settings.micro_batch_tokens] if settings.micro_batch_tokens else []
        used = min([*limits, share.tokens] if share is not None else limits)
        allowed = int(type(settings).__dataclass_fields__["micro_batch_tokens"].metadata["at_least"])
        fewer = max(used // 2, allowed)
        least = fewer if share is None else max(fewer, share.longest)
        return fewer if least < used else None
