"""The three sets of prompts that a baseline is fitted on, each divided into training and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dcr_scale.config import DataConfig, Source
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import GENERAL, load_contrast
from dcr_scale.data.instructions import load_general
from dcr_scale.data.sources import read_rows
from dcr_scale.data.splitting import normalised, split_by_family
from dcr_scale.errors import UserError

Name = Literal["seemingly_toxic", "toxic", "harmless"]
NAMES: tuple[Name, ...] = ("seemingly_toxic", "toxic", "harmless")

# Of Surgical's paper; SCANS takes the first 64 to train on.
TRAIN, VALIDATION = 128, 32


@dataclass(frozen=True)
class Prompt:
    """A prompt of one set; a family is never on both sides of the division."""

    text: str
    name: Name
    family: str


@dataclass(frozen=True)
class Divided:
    """A set's prompts; neither side is empty."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


@dataclass(frozen=True)
class EncodedSet:
    """A :class:`Divided` in token ids."""

    train: list[list[int]]
    validation: list[list[int]]


Prompts = Mapping[Name, Divided]


def read_prompts(files: Mapping[Name, str | None], data: DataConfig, *, seed: int) -> Prompts:
    """Read a file for each set that has one, and divide all by family.

    A set without a file is what a run of ``data`` and ``seed`` trains on: seemingly toxic and toxic prompts of its
    contrast sources, harmless ones of its general instructions. What that run holds out stays unseen. Raises UserError
    for a file that cannot be read, a prompt in two sets, and a set of one family.
    """
    prompts: list[Prompt] = []
    for name in NAMES:
        prompts += read_set(name, files[name], data, seed=seed)
    _check_apart(prompts)
    train, validation = split_by_family(
        prompts,
        of_class=lambda prompt: prompt.name,
        unit=lambda prompt: prompt.text,
        share=VALIDATION / (TRAIN + VALIDATION),
        limit=VALIDATION,
        seed=seed,
        purpose="baselines",
    )
    divided: dict[Name, Divided] = {}
    for name in NAMES:
        sides = [tuple(p.text for p in side if p.name == name) for side in (train, validation)]
        if not all(sides):
            raise UserError(f"{name}: all prompts are of one family; one is needed to train on and one to validate")
        divided[name] = Divided(*sides)
    return divided


def read_set(name: Name, file: str | None, data: DataConfig, *, seed: int) -> list[Prompt]:
    """A set's prompts out of its file or, without one, out of the training side of ``data``."""
    if file is not None:
        return _from_file(name, file)
    if name == "harmless":
        return [Prompt(i.prompt, name, f"general {i.family}") for i in load_general(data, seed).train]
    train = load_contrast(data, seed).train
    # General instructions on the seemingly toxic side look like nothing of the kind, and are harmless ones' here.
    return [Prompt(p.text, name, f"contrast {p.family}") for p in train if p.label == name and p.source != GENERAL]


def encode(prompts: Prompts, encoder: ChatEncoder) -> dict[Name, EncodedSet]:
    """The sets in token ids, without what is too long where ``encoder.overlong`` drops it. Raises UserError."""

    def encoded(texts: Sequence[str], what: str) -> list[list[int]]:
        return [ids for ids in encoder.encode_prompts(texts, what) if ids is not None]

    return {
        name: EncodedSet(
            encoded(divided.train, f"{name} prompts"), encoded(divided.validation, f"{name} validation prompts")
        )
        for name, divided in prompts.items()
    }


def _from_file(name: Name, path: str) -> list[Prompt]:
    kept: dict[str, Prompt] = {}
    for row in read_rows(Source(path=path), kind="prompts"):
        text, family, pair = (row.values[key] for key in ("prompt", "family", "pair"))
        form = normalised(text)
        kept.setdefault(form, Prompt(text, name, family or (f"pair {pair}" if pair else form)))
    return list(kept.values())


def _check_apart(prompts: Sequence[Prompt]) -> None:
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(normalised(prompt.text), prompt)
        if other.name != prompt.name:
            raise UserError(
                f"{prompt.text[:60]!r} is both among the {other.name} and the {prompt.name} prompts; remove it from one"
            )
