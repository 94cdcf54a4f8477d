"""The two classes of prompts of a comparison, out of their files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch
from torch import Tensor

from dcr_scale.config import ContrastSource, Label, Source
from dcr_scale.data.sources import HUB, quoted, read_rows
from dcr_scale.data.splitting import draw, normalised
from dcr_scale.errors import UserError
from dcr_scale.similarity.settings import SimilarityConfig

log = logging.getLogger(__name__)

_BUILTIN: dict[str, Label] = {"a": "seemingly_toxic", "b": "toxic"}


@dataclass(frozen=True)
class Prompt:
    """``pair`` is shared with its matched partners of the other class; prompts of one ``unit`` are no independent
    draws (a family, a pair, or the prompt alone)."""

    text: str
    pair: str | None
    unit: str
    where: str


@dataclass(frozen=True)
class Classes:
    """Both classes' prompts in one order, a's before b's; matched pairs come first in each, in the same order."""

    names: tuple[str, str]
    prompts: tuple[Prompt, ...]
    first: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.first, len(self.prompts) - self.first

    @property
    def in_a(self) -> Tensor:
        """bool [N]."""
        return torch.arange(len(self.prompts)) < self.first

    @property
    def matched(self) -> Tensor:
        """bool [N, N]: the pairs of prompts, one of each class, that the files match with one another."""
        pairs = [prompt.pair for prompt in self.prompts]
        same = torch.tensor([[p is not None and p == q for q in pairs] for p in pairs])
        return same & (self.in_a[:, None] != self.in_a[None, :])

    @property
    def units(self) -> Tensor:
        """int64 [N]: the number of each prompt's unit."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(prompt.unit, len(numbers)) for prompt in self.prompts])


def read_classes(config: SimilarityConfig) -> Classes:
    """Read both classes, drop repeated prompts, and draw ``config.limit`` of each.

    Raises UserError for sources that cannot be read, a class of fewer than two prompts or of one family alone, a prompt
    in both, and a pair of two prompts in one.
    """
    names = _names(config.a, config.b)
    found = {"a": _read(config.a, "a"), "b": _read(config.b, "b")}
    _check_apart(found["a"], found["b"])
    common = {prompt.pair for prompt in found["a"]} & {prompt.pair for prompt in found["b"]} - {None}
    drawn = [_draw(found[side], common, config) for side in ("a", "b")]
    for name, prompts in zip(names, drawn, strict=True):
        if len(prompts) < 2:
            raise UserError(f"{name}: {len(prompts)} different prompt; similarity within a class takes at least two")
        if len({prompt.unit for prompt in prompts}) < 2:
            raise UserError(
                f"{name}: all {len(prompts)} prompts are of one {prompts[0].unit.split()[0]}, so how much other ones "
                "would change the result cannot be told; take several, or leave the column out"
            )
    return Classes(names, (*drawn[0], *drawn[1]), len(drawn[0]))


def _read(source: Source, side: str) -> list[Prompt]:
    if source.path == "builtin":
        contrast = ContrastSource(columns=source.columns)
        rows = [row for row in read_rows(contrast, kind="contrast") if row.values["label"] == _BUILTIN[side]]
    else:
        rows = read_rows(source, kind="prompts")
    kept: dict[str, Prompt] = {}
    for row in rows:
        text, family, pair = row.values["prompt"], row.values["family"], row.values["pair"]
        unit = f"family {family}" if family else f"pair {pair}" if pair else f"prompt {normalised(text)}"
        kept.setdefault(normalised(text), Prompt(text, pair or None, unit, row.where))
    if len(kept) < len(rows):
        log.info("%s: dropped %d prompts that repeat others", source.path, len(rows) - len(kept))
    sides: dict[str, Prompt] = {}
    for prompt in kept.values():
        other = prompt if prompt.pair is None else sides.setdefault(prompt.pair, prompt)
        if other is not prompt:
            raise UserError(
                f"pair {quoted(prompt.pair or '')} has two prompts of class {side} ({other.where}; {prompt.where}); a "
                "pair is one prompt of each class, so rename one"
            )
    return list(kept.values())


def _draw(prompts: Sequence[Prompt], common: set[str | None], config: SimilarityConfig) -> list[Prompt]:
    """At most ``limit``: matched ones, which fall alike in both classes, and then the others."""
    matched = sorted((prompt for prompt in prompts if prompt.pair in common), key=lambda prompt: prompt.pair or "")
    single = [prompt for prompt in prompts if prompt.pair not in common]
    kept = draw(matched, config.limit, lambda prompt: f"pair {prompt.pair}", seed=config.seed, purpose="probe")
    room = None if config.limit is None else config.limit - len(kept)
    return kept + draw(single, room, lambda prompt: prompt.text, seed=config.seed, purpose="probe")


def _check_apart(a: Sequence[Prompt], b: Sequence[Prompt]) -> None:
    places = {normalised(prompt.text): prompt.where for prompt in a}
    for prompt in b:
        where = places.get(normalised(prompt.text))
        if where is not None:
            raise UserError(
                f"{quoted(prompt.text)} is in both classes ({where}; {prompt.where}); remove it from one, or its "
                "similarity with itself counts as one across classes"
            )


def _names(a: Source, b: Source) -> tuple[str, str]:
    """What to call the classes: by their files, unless these have one name."""
    names = []
    for side, source in (("a", a), ("b", b)):
        stem = _BUILTIN[side] if source.path == "builtin" else PurePath(source.path.removeprefix(HUB)).stem
        names.append(stem.replace("_", " "))
    return ("a", "b") if names[0] == names[1] else (names[0], names[1])
