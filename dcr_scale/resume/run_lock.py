"""One job at a time in a run's folder."""

from __future__ import annotations

import errno
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
# Lustre mounted without -o flock, NFS without its lock daemon.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class RunLock:
    """Held by every rank of a job while it works in ``folder``; the kernel releases it however a process ends.

    The first rank needs the lock for itself before it shares it with its own ranks: it then knows that none of an
    earlier job's is left to write into what this one makes. Every rank builds it. Raises UserError on all of them
    where another job does not leave. On a file system without locks it warns, and nobody is kept out.
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
                self._lock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def _take(self) -> None:
        assert self._file is not None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        self._lock(fcntl.LOCK_SH)

    def _lock(self, how: int) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, how)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # The first rank begins with this one: it is said once.
            if how & fcntl.LOCK_EX:
                log.warning(
                    "%s: this file system has no locks (%s), so nothing keeps a second job out of the folder: start "
                    "none there while this one runs, or set run.dir to a folder on another disk",
                    self._file.name, error.strerror,
                )  # fmt: skip

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
