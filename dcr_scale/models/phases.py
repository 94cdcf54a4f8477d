"""A folder that all ranks write together, phase by phase, whether they share a disk or not."""

from __future__ import annotations

import errno
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.world import World

_ADVICE = {
    errno.ENOSPC: "free space or set run.dir to another disk",
    errno.EDQUOT: "free space or set run.dir to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or set run.dir to another disk",
    errno.EACCES: "make the folder writable or set run.dir to another",
    errno.EROFS: "set run.dir to a folder that can be written",
}
FREE_SPACE = _ADVICE[errno.ENOSPC]

# How long a network file system may take to show one node what another has made.
_VISIBLE_SECONDS = 10.0


class Phases:
    """Steps towards the folder ``destination``, which all ranks take together.

    Attributes:
        writers: of each rank, the lowest rank that sees the same disk; set by :meth:`find_writers`.
    """

    def __init__(self, destination: Path, world: World) -> None:
        self.destination, self.world = destination, world
        self.partial = disk.partial_name(destination)
        self.token = str(world.gather(secrets.token_hex(8))[0])
        self.writers = list(range(world.size))

    @property
    def writes(self) -> bool:
        """Whether this rank makes the files on its disk."""
        return self.writers[self.world.rank] == self.world.rank

    @property
    def disks(self) -> list[int]:
        """The writer of each disk."""
        return sorted(set(self.writers))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A phase that no rank leaves before all are through it; where one has failed, all raise the same UserError.

        The block may hold collectives only if no rank can fail before or between them.
        """
        failure: Exception | None = None
        message = None
        try:
            yield
        except UserError as error:
            message = str(error)
        except OSError as error:
            where = error.filename or self.partial
            advice = _ADVICE.get(error.errno or 0, "see to it and run again")
            message = f"{where}: {error.strerror or error}; {self.destination} was not written: {advice}"
        except Exception as error:
            # A bug: its traceback belongs on this rank, but the others must not wait for it in vain.
            failure, message = error, f"rank {self.world.rank} failed in writing {self.destination}: {error!r}"
        messages = self.world.gather(message)
        if failure is not None:
            raise failure
        first = next((found for found in messages if found is not None), None)
        if first is not None:
            raise UserError(first)

    def find_writers(self) -> None:
        """Find out which ranks see the same disk where ``destination`` will lie, by files that each leaves there."""
        if self.world.size == 1:
            return
        folder, ranks = self.destination.parent, range(self.world.size)
        left = [folder / f".{self.token}.{rank}" for rank in ranks]
        try:
            with self.together():
                folder.mkdir(parents=True, exist_ok=True)
                left[self.world.rank].touch()
            deadline = time.monotonic() + _VISIBLE_SECONDS
            while True:
                seen = [rank for rank in ranks if left[rank].exists()]
                if len(seen) == len(ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            by_rank: list[list[int]] = self.world.gather(seen)
        finally:
            left[self.world.rank].unlink(missing_ok=True)
        # A slow file system may have shown one of two ranks the other's file, and not the reverse.
        before: list[int] = []
        while before != self.writers:
            before = list(self.writers)
            for rank, others in enumerate(by_rank):
                lowest = min(self.writers[other] for other in [rank, *others])
                for other in [rank, *others]:
                    self.writers[other] = lowest

    def make_partial(self) -> None:
        """On each disk's writer: an empty folder to build in, beside the destination."""
        disk.restore_replaced(self.destination)
        if self.destination.exists() and not self.destination.is_dir():
            raise UserError(f"{self.destination}: is in the way of the export and no folder; move it away")
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)

    def await_partial(self, marker: Path) -> None:
        """Wait until this rank sees what its disk's writer has made. Raises UserError when that takes too long."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not marker.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.partial}: made by rank {self.writers[self.world.rank]}, but rank {self.world.rank} does "
                    f"not see it after {_VISIBLE_SECONDS:.0f} s; the file system is slow: run again, or set run.dir "
                    "to another"
                )
            time.sleep(0.1)
