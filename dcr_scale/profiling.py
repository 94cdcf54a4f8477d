"""Traces of training steps by torch's profiler, for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dcr_scale.config import ProfileConfig
from dcr_scale.world import World

log = logging.getLogger(__name__)


@contextmanager
def traced(settings: ProfileConfig, folder: Path, stage: str, world: World) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after every optimiser step.

    After ``settings.after`` steps the first rank traces ``settings.steps`` of them into
    ``<folder>/profile/<stage>.json.gz``, shapes and memory included. Where a stage ends sooner there is no trace.
    """
    if not settings.steps or not world.first:
        yield lambda: None
        return
    path = folder / "profile" / f"{stage}.json.gz"

    def export(finished: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(path))
        log.info("wrote %s", path)

    # The profiler's own first step is slow, so one more runs under it without being kept.
    waited = max(0, settings.after - 1)
    with profile(
        activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        schedule=schedule(wait=waited, warmup=min(1, settings.after), active=settings.steps, repeat=1),
        on_trace_ready=export,
        record_shapes=True,
        profile_memory=True,
    ) as running:
        yield running.step
