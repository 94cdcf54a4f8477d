"""``progress.json``: which parts of a run are done and what they found, so that the same command goes on after them."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcr_scale import typed_yaml
from dcr_scale.config import Config, EngineConfig
from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.world import World

FILE = "progress.json"
FORMAT = 1

# Settings that may be others when a run goes on: where it runs, how it spends memory, what it says. Training goes the
# same way then, up to rounding.
FREE = (
    "run.dir",
    "log",
    "checkpoint",
    "profile",
    "model.attention",
    "model.gradient_checkpointing",
    "refine.micro_batch_tokens",
    "refine.retention.memory_gib",
    "align.micro_batch_tokens",
    "probe.micro_batch_tokens",
    "look.batch_size",
    "look.partitioned",
    *(f"engine.{field.name}" for field in dataclasses.fields(EngineConfig) if field.name != "precision"),
)

# What a run makes in its folder, by glob patterns; a fresh start removes it. The others are written over at once.
_MADE = (
    FILE, "checkpoints", "refined", "aligned", "adapter", "look", "metrics.jsonl", "summary.json", "report.html",
    "answered.jsonl", "kernel_similarity.json", "proposition.json", "profile", "tensorboard", "wandb",
    # What a killed one was building, or had put aside for a moment.
    "retention-*.bin",
    *(f"{name}.{state}" for name in ("refined", "aligned", "adapter") for state in ("partial", "replaced")),
)  # fmt: skip


class Progress:
    """What of a run is done, the same on every rank.

    Attributes:
        parts: names of finished parts, in order.
        kept: what they left to the parts after them, as JSON holds it.
        id: one run's own, through all its interruptions.
    """

    def __init__(self, folder: Path, about: dict[str, Any], world: World):
        self.folder, self.about, self.world = folder, about, world
        self.parts: list[str] = []
        self.kept: dict[str, Any] = {}
        self.id = world.gather(secrets.token_hex(8))[0]

    @classmethod
    def open(
        cls, folder: Path, about: dict[str, Any], world: World, *, fresh: bool = False, accept_changes: bool = False
    ) -> Progress:
        """The run in ``folder`` as it was left, or one that begins.

        Args:
            about: what the run is made by: ``settings`` as a tree, and digests of its data and source. A run that was
                made by others is not gone on with unless ``accept_changes``.
            fresh: forget what is there and remove what it made.

        Every rank calls it. Raises UserError on all, with each difference, for a folder of another run, and for one
        that newer code has left.
        """
        progress, found = cls(folder, about, world), None
        with world.agreed(folder):
            if world.first:
                if fresh:
                    _remove(folder)
                found = _read(folder / FILE)
                if found is not None and not accept_changes:
                    progress._compare(found["about"])
        found = world.gather(found)[0]
        if found is not None:
            progress.parts, progress.kept, progress.id = found["parts"], found["kept"], found["id"]
        return progress

    def done(self, part: str) -> bool:
        return part in self.parts

    def finish(self, part: str, kept: dict[str, Any]) -> None:
        """A part is done; ``kept`` is all that later parts, and the summary, must know. Every rank calls it."""
        self.parts.append(part)
        self.kept = kept
        self.write()

    def write(self) -> None:
        path = self.folder / FILE
        with self.world.agreed(path):
            if self.world.first:
                partial = path.with_suffix(".partial")
                tree = {"format": FORMAT, "id": self.id, "about": self.about, "parts": self.parts, "kept": self.kept}
                partial.write_text(json.dumps(tree), encoding="utf-8")
                disk.sync(partial)
                os.replace(partial, path)
                disk.sync(self.folder)

    def _compare(self, before: dict[str, Any]) -> None:
        differences = [
            f"{key}: {_shown(old)} then, {_shown(new)} now" for key, old, new in differing(before, self.about)
        ]
        if differences:
            raise UserError(
                f"{self.folder}: holds a run with other settings ({'; '.join(differences)}); give another run.name or "
                "run.dir, --fresh to begin anew, or --accept-changes to go on all the same"
            )


def differing(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Key, value before and value now wherever they differ and may not.

    A setting that there was not yet had today's default.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    defaults = _leaves({"settings": typed_yaml.to_tree(Config())})
    old = {key: value for key, value in defaults if key in new and _is_new(key, old)} | old
    for key in sorted(old.keys() | new.keys()):
        name = key.removeprefix("settings.")
        free = any(name == path or name.startswith(path + ".") for path in FREE)
        if not free and old.get(key) != new.get(key):
            yield name, old.get(key), new.get(key)


def _is_new(key: str, old: dict[str, Any]) -> bool:
    """Whether there was no such setting, and not merely null in the place of what holds it."""
    parts = key.split(".")
    holders = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return not any(holder in old for holder in holders)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        written = int(found["format"])
        missing = written <= FORMAT and {"id", "about", "parts", "kept"} - found.keys()
        if missing:
            raise KeyError(*missing)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; --fresh begins the run anew") from None
    if written > FORMAT:
        raise UserError(
            f"{path}: was written by a newer version of dcr-scale (format {written}, this one reads {FORMAT}); "
            "install that version, or begin anew with --fresh"
        )
    return found


def _remove(folder: Path) -> None:
    for path in [path for pattern in _MADE for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
