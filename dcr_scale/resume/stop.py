"""How a run is told to stop: SIGTERM or SIGUSR1 to any of its ranks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dcr_scale.world import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal until all ranks ask for it together. The handler itself only sets a flag: it may come in the
    middle of a collective, which the other ranks are in as well."""

    def __init__(self) -> None:
        self._received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals that come while the context is open are remembered. In the main thread only."""
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def requested(self, world: World) -> str | None:
        """By what the run has been told to stop, on whichever rank; None to go on. Every rank calls it."""
        (number,) = world.max(self._received)
        return f"told to stop by {signal.Signals(int(number)).name}" if number else None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
