"""``status.json`` in a run's folder: what became of the run, for whoever looks from outside."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from dcr_scale.world import World

State = Literal["running", "preempted", "finished", "failed"]

FILE = "status.json"


class Status:
    """Written by the first rank, and by any rank that fails. ``time`` is for people: nothing decides by it."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        self.path, self.rank = folder / FILE, rank
        self.about = {"host": socket.gethostname(), "pid": os.getpid(), "world_size": world_size}
        self._latest: dict[str, Any] = {}

    def begin(self, world: World) -> None:
        """An attempt begins: how an earlier one ended counts no more, on any disk. Every rank calls it."""
        with world.agreed(), suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.write("running", stage="start", step=0, reason="")

    def write(self, state: State, **facts: Any) -> None:
        """Replace what is there. ``facts`` (stage, step, reason) stay in until they are given anew.

        A status that cannot be written must not end a run, nor hide why one ended.
        """
        self._latest.update(facts)
        if self.rank and state != "failed":
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"state": state, **self._latest, "time": now, **self.about, "rank": self.rank}, indent=1)
        partial = self.path.with_name(f"{FILE}.{self.rank}.partial")
        with suppress(OSError):
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, self.path)

    def fail(self, reason: str) -> None:
        """Say why the attempt ended. The first cause stays: when one rank dies, the others fail of its absence."""
        with suppress(OSError, ValueError):
            if json.loads(self.path.read_text(encoding="utf-8"))["state"] == "failed":
                return
        self.write("failed", reason=reason)
