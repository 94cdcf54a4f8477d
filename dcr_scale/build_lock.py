"""What a killed build of DeepSpeed's collectives leaves behind."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import psutil

log = logging.getLogger(__name__)


def remove_stale_lock(lock: Path, *, age_seconds: float = 120.0) -> None:
    """Remove the lock of an extension build that was killed: torch would wait for it for ever.

    A build holds its lock open, so one that no process here has open is left over. Its age leaves room for a build on
    another node that shares this home.
    """
    try:
        old = time.time() - lock.stat().st_mtime > age_seconds
    except OSError:
        return
    holders = [p.pid for p in psutil.process_iter() if str(lock) in _open_files(p)]
    if holders:
        log.info("waiting for process %d, which builds DeepSpeed's shared-memory collectives", holders[0])
    elif old:
        log.warning("removing %s, left over from a build that was killed", lock)
        lock.unlink(missing_ok=True)
    else:
        log.warning("waiting for %s; delete it if nothing is being built on a machine that shares this home", lock)


def _open_files(process: psutil.Process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:
        return set()
