"""What a run says while it runs: metrics.jsonl, one console line a step, and optional trackers."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from dcr_scale.config import LogConfig
from dcr_scale.errors import UserError
from dcr_scale.world import World, cannot_write, peak_memory_gib

log = logging.getLogger(__name__)


def configure_console(rank: int) -> None:
    """Plain messages of this package on rank 0; warnings alone from the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("dcr_scale").setLevel(logging.INFO if rank == 0 else logging.ERROR)


class Trackers:
    """TensorBoard and Weights & Biases, where the configuration names them. Both live on rank 0 only."""

    def __init__(self, config: LogConfig, folder: Path, name: str, settings: dict[str, Any], run_id: str):
        self._tensorboard = self._wandb = None
        missing = [name for name in config.trackers if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(
                f"log.trackers names {', '.join(missing)}, which is not installed: pip install -e '.[tracking]' in the "
                "repository, or set log.trackers=[]"
            )
        if "tensorboard" in config.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in config.trackers:
            import wandb

            # By its id, a run that goes on after an interruption goes on in the same place there.
            self._wandb = wandb.init(
                project=config.project, name=name, config=settings, dir=str(folder), id=run_id, resume="allow"
            )

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        if self._tensorboard is not None:
            for key, value in values.items():
                self._tensorboard.add_scalar(f"{stage}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{stage}/step": step, **{f"{stage}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class RunLog:
    """Metrics of a run, written by rank 0; on other ranks every method does nothing.

    An earlier ``metrics.jsonl`` is written on: :meth:`rewind` takes back what came after the state that the run goes
    on from. ``run_id`` is the run's own through all its interruptions.
    """

    def __init__(
        self, config: LogConfig, folder: Path, name: str, settings: dict[str, Any], world: World, run_id: str = "run"
    ):
        self.config, self.world = config, world
        self.path = folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._trackers: Trackers | None = None
        self._failure: str | None = None
        with world.agreed(self.path):
            if world.first:
                self._file = self.path.open("a", encoding="utf-8")
                self._trackers = Trackers(config, folder, name, settings, run_id)
        self._clock = time.perf_counter()
        self._seconds_a_step = 0.0

    def start(self) -> None:
        """Start the clock of a stage's steps."""
        self._clock = time.perf_counter()
        self._seconds_a_step = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not the steps'."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def step(self, stage: str, step: int, steps: int, *, tokens: int, device_memory: float, **values: float) -> None:
        """Record one optimiser step (counted from 1) that ran ``tokens`` tokens over all ranks."""
        if not self.world.first:
            return
        now = time.perf_counter()
        latest, rate = now - self._clock, tokens / (now - self._clock)
        self._clock = now
        # The first steps warm up; a running mean forgets them.
        self._seconds_a_step = latest if not self._seconds_a_step else 0.7 * self._seconds_a_step + 0.3 * latest
        left = self._seconds_a_step * (steps - step)
        values = {**values, "tokens_per_second": rate, "memory_gib": device_memory}
        self.record(stage, step, values)
        if step % self.config.every and step != steps:
            return
        shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items() if key not in _UNITS)
        log.info(
            "%s %4d/%d  %s  %s tok/s  %.1f GiB  %s left",
            stage,
            step,
            steps,
            shown,
            f"{rate:,.0f}",
            device_memory,
            duration(left),
        )

    def record(self, stage: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the numbers in it to the trackers."""
        if self._file is None or self._trackers is None:
            return
        row = finite({"stage": stage, "step": step, **values})
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            # The other ranks learn of it where all meet next; raised here, it would leave them waiting.
            self._failure = self._failure or cannot_write(self.path, error)
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
        self._trackers.log(stage, step, numbers)

    @property
    def size(self) -> int:
        """Bytes of ``metrics.jsonl`` so far; 0 on other ranks than the first."""
        return 0 if self._file is None else self.path.stat().st_size

    def rewind(self, size: int) -> None:
        """Forget all that was recorded after the file had ``size`` bytes."""
        if self._file is not None and self.size > size:
            self._file.truncate(size)

    def memory(self) -> float:
        """The largest rank's peak memory so far in GiB.

        A collective, and where all ranks learn that rank 0 could not write the metrics: UserError on each.
        """
        memory, failed = self.world.max(peak_memory_gib(self.world.device), float(self._failure is not None))
        if failed:
            raise UserError(self._failure or f"{self.path}: cannot be written")
        return memory

    def close(self) -> None:
        if self._file is not None and self._trackers is not None:
            self._file.close()
            self._trackers.close()


_UNITS = {"tokens_per_second", "memory_gib"}


def finite(value: Any) -> Any:
    """A tree of dicts, lists and scalars with None for every number that is not finite: JSON has no nan."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: float) -> str:
    return f"{value:.1e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e4) else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000: 512 B, 70.6 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people: 3m20s, 2h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
