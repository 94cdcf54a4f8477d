"""One tensor that several linears read, as queries, keys and values do: entered into a sink once for all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from dcr_scale.probe.units import Unit

if TYPE_CHECKING:
    from dcr_scale.probe.capture import Sink


class SharedInputs:
    """Enters the units of a forward pass into a sink, those that read the same tensor together.

    Which they are is learned in the first pass: units that follow each other and are given one object. A later pass in
    which a unit is given another tensor than it was then is entered as it comes.
    """

    def __init__(self) -> None:
        self._readers_of: dict[str, list[Unit]] = {}
        self.forget()

    def forget(self) -> None:
        """The pass is over."""
        self._last: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._readers: list[Unit] = []
        self._entered: dict[str, Tensor] = {}

    def enter(self, sink: Sink, unit: Unit, x: Tensor) -> tuple[Tensor, bool]:
        """What ``sink`` keeps of ``unit``'s input ``x`` [..., D], and whether it is the first to read it."""
        flat = x.detach().reshape(-1, x.shape[-1])
        # Not held: between two linears an activation may be all that memory has no room for.
        is_first = self._last() is not x or self._version != x._version
        if is_first:
            self._last, self._version = weakref.ref(x), x._version
            self._readers = self._readers_of.setdefault(unit.name, [unit])
            kept = sink.enter(self._readers, flat, None)
            self._entered = {reader.name: one for reader, one in zip(self._readers, kept, strict=True)}
        elif unit.name not in self._entered:
            self._readers.append(unit)
            self._entered[unit.name] = sink.enter([unit], flat, None)[0]
        return self._entered[unit.name], is_first
