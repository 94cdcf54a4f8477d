"""Bytes that a stage reads and writes in the file systems, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

from dcr_scale.planning.modules import ModuleList

_FLOAT = 4


@dataclass(frozen=True)
class Disk:
    """Bytes over all ranks.

    Attributes:
        loaded: read to fill the stage's model: once for the whole job.
        copied: read from the source for what the export leaves as it was.
        exported: written as the stage's result.
        state: written for one state of training.
        states: how many of them are there at once, at most.
    """

    loaded: int
    copied: int
    exported: int
    state: int
    states: int

    @property
    def read(self) -> int:
        return self.loaded + self.copied

    @property
    def written(self) -> int:
        """Without states of training, of which there are as many as the stage is long."""
        return self.exported


def plan_disk(
    modules: ModuleList,
    *,
    whole: int,
    adapted: int,
    export: str,
    file_bytes: int,
    every: int,
    keep: int,
    steps: int,
    probed: bool = False,
) -> Disk:
    """Of one stage.

    Args:
        whole: elements of the whole model, each once.
        adapted: elements of the weights that adapters stand beside; 0 where weights train themselves.
        export: merged, adapter or both.
        file_bytes: of an element in the checkpoint's files.
        every, keep: steps between two states of training, 0 for none, and how many of them are kept.
        probed: a probe reads the whole model beside the stage's own.
    """
    adapters = sum(p.numel for p in modules.parameters if p.adapter)
    changed = adapted or modules.trained
    merged = export in ("merged", "both")
    states = min(keep + 1, (steps - 1) // every) if every else 0
    return Disk(
        loaded=(modules.held - adapters + (whole if probed else 0)) * file_bytes,
        copied=(whole - changed) * file_bytes if merged else 0,
        exported=(whole * file_bytes if merged else 0) + (adapters * _FLOAT if export in ("adapter", "both") else 0),
        # Masters and both moments, which is all that training adds to the source.
        state=3 * _FLOAT * modules.trained,
        states=states,
    )
