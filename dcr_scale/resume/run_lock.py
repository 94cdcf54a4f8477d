"""One job at a time in a run's folder."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from dcr_scale.errors import UserError
from dcr_scale.world import World

log = logging.getLogger(__name__)

FILE = "lock"
# A rank of a job that was killed may outlive it by the time its launcher takes to notice.
_PATIENCE_SECONDS = 15.0


class RunLock:
    """Held by every rank of a job while it works in ``folder``; the kernel releases it however a process ends.

    The first rank needs the lock for itself before it shares it with its own ranks: it then knows that none of an
    earlier job's is left to write into what this one makes. Every rank builds it. Raises UserError on all of them
    where another job does not leave.
    """

    def __init__(self, folder: Path, world: World):
        path = folder / FILE
        self._file: IO[str] | None = None
        with world.agreed(path):
            if world.first:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a+", encoding="utf-8")
                self._take()
        with world.agreed(path):
            if not world.first:
                # Where ranks share no file system, each node has a folder of its own.
                folder.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a+", encoding="utf-8")
                fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _take(self) -> None:
        assert self._file is not None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "unknown"
                    raise UserError(
                        f"{self._file.name}: another job works in this folder ({holder}); wait for it, or set run.dir "
                        "to another folder"
                    ) from None
                time.sleep(0.5)
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
