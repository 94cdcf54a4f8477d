"""Stage 1's prompts: two classes that look alike, split by family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

from dcr_scale.config import ContrastSource, DataConfig, Label
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.instructions import load_general
from dcr_scale.data.sources import Row, listed, quoted, read_rows
from dcr_scale.data.splitting import draw, normalised, split_by_family
from dcr_scale.errors import UserError

# The source that is the run's own general instructions.
GENERAL = "general"


@dataclass(frozen=True)
class ContrastPrompt:
    """One prompt. ``pair`` is shared with its matched partner of the other class, where it has one."""

    text: str
    label: Label
    family: str
    pair: str | None
    source: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class ContrastSet:
    """Each side has both classes, no family is on both; in seeded order, the prompts of a pair adjacent."""

    train: tuple[ContrastPrompt, ...]
    heldout: tuple[ContrastPrompt, ...]


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and, in the same order, their token ids."""

    prompts: tuple[ContrastPrompt, ...]
    ids: tuple[list[int], ...]


@dataclass(frozen=True)
class EncodedContrast:
    """A :class:`ContrastSet` in token ids, without what was too long and dropped."""

    train: EncodedPrompts
    heldout: EncodedPrompts


def telling(prompts: EncodedPrompts, label: Label) -> list[tuple[ContrastPrompt, list[int]]]:
    """The prompts of a class that show what a model makes of it, with their token ids: general instructions on the
    seemingly toxic side look like nothing of the kind. They count where there are no others."""
    mine = [both for both in zip(prompts.prompts, prompts.ids, strict=True) if both[0].label == label]
    return [both for both in mine if both[0].source != GENERAL] or mine


def load_contrast(data: DataConfig, seed: int) -> ContrastSet:
    """Read ``data.contrast``, drop duplicates within a class, and hold families out.

    The source ``general`` is the training side of ``data.general``: what is held out there stays unseen.

    A prompt without a family belongs to its pair's, and without a pair is one by itself; families of one name
    in several sources are one family. Raises UserError for unreadable sources, a prompt that is in both
    classes, a pair that is none, and a class that is empty on either side.
    """
    prompts: list[ContrastPrompt] = []
    for source in data.contrast:
        found = _general_rows(data, source, seed) if source.path == GENERAL else read_rows(source, kind="contrast")
        rows = [_prompt(row.values, source.path, row.where) for row in found]
        prompts += draw(rows, source.limit, _unit, seed=seed, purpose="limit")
    prompts = _without_duplicates(prompts)
    _check_both_classes(prompts, "data.contrast", "add a source that has some, or check labels")
    _check_pairs(prompts)
    train, heldout = split_by_family(
        # the sides of a pair in one order, whatever theirs was in the file
        sorted(prompts, key=lambda prompt: prompt.label),
        of_class=lambda prompt: prompt.label,
        unit=_unit,
        share=data.heldout,
        limit=data.heldout_limit,
        seed=seed,
        purpose="contrast",
    )
    advice = "its prompts are all in one family, and a class needs two"
    _check_both_classes(train, "data.contrast's training side", advice)
    _check_both_classes(heldout, "data.contrast's held-out side", advice)
    return ContrastSet(train, heldout)


def encode_contrast(contrast: ContrastSet, encoder: ChatEncoder) -> EncodedContrast:
    """Both sides in token ids, whole pairs only.

    Raises UserError where a prompt is too long and ``data.overlong`` says so, and where a class is left empty.
    """
    return EncodedContrast(
        _encode(contrast.train, encoder, "contrast prompts"),
        _encode(contrast.heldout, encoder, "held-out contrast prompts"),
    )


def _encode(prompts: Sequence[ContrastPrompt], encoder: ChatEncoder, what: str) -> EncodedPrompts:
    encoded = encoder.encode_prompts([prompt.text for prompt in prompts], what)
    # A prompt that is too long takes its partner with it, or the set would no longer be matched.
    dropped = {prompt.pair for prompt, ids in zip(prompts, encoded, strict=True) if ids is None and prompt.pair}
    kept = [
        (prompt, ids)
        for prompt, ids in zip(prompts, encoded, strict=True)
        if ids is not None and prompt.pair not in dropped
    ]
    for label in get_args(Label):
        if not any(prompt.label == label for prompt, _ in kept):
            raise UserError(f"{what}: no {label} prompt is left within data.max_prompt_tokens")
    return EncodedPrompts(tuple(prompt for prompt, _ in kept), tuple(ids for _, ids in kept))


def _general_rows(data: DataConfig, source: ContrastSource, seed: int) -> list[Row]:
    if source.label is None:
        raise UserError("data.contrast: the source general has no labels; give it label: seemingly_toxic")
    blank = {"pair": "", "category": "", "label": source.label}
    return [
        Row({"prompt": one.prompt, "family": one.family, **blank}, one.where) for one in load_general(data, seed).train
    ]


def _prompt(values: dict[str, str], source: str, where: str) -> ContrastPrompt:
    text, pair = values["prompt"], values["pair"] or None
    family = values["family"] or (f"pair {pair}" if pair else normalised(text))
    return ContrastPrompt(text, cast(Label, values["label"]), family, pair, source, where)


def _unit(prompt: ContrastPrompt) -> str:
    return f"prompt {normalised(prompt.text)}" if prompt.pair is None else f"pair {prompt.pair}"


def _without_duplicates(prompts: Sequence[ContrastPrompt]) -> list[ContrastPrompt]:
    """The first of each class's prompts of one normal form. Raises UserError where the classes share one."""
    first: dict[str, ContrastPrompt] = {}
    clashes: dict[str, str] = {}
    for prompt in prompts:
        form = normalised(prompt.text)
        kept = first.setdefault(form, prompt)
        if kept.label != prompt.label:
            clashes.setdefault(form, f"{quoted(kept.text)} ({kept.where}; {prompt.where})")
    if clashes:
        raise UserError(
            f"data.contrast: prompts of both classes: {listed(list(clashes.values()))}; remove each from one class"
        )
    return list(first.values())


def _check_both_classes(prompts: Sequence[ContrastPrompt], what: str, advice: str) -> None:
    counts = Counter(prompt.label for prompt in prompts)
    for label in get_args(Label):
        if not counts[label]:
            found = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none at all"
            raise UserError(f"{what} has no {label} prompts (found {found}): {advice}")


def _check_pairs(prompts: Sequence[ContrastPrompt]) -> None:
    sides: dict[tuple[str, str], ContrastPrompt] = {}
    families: dict[str, ContrastPrompt] = {}
    for prompt in prompts:
        if prompt.pair is None:
            continue
        other = sides.setdefault((prompt.pair, prompt.label), prompt)
        if other is not prompt:
            raise UserError(
                f"data.contrast: pair {quoted(prompt.pair)} has two {prompt.label} prompts ({other.where}; "
                f"{prompt.where}); a pair is one prompt of each class, so rename one"
            )
        other = families.setdefault(prompt.pair, prompt)
        if other.family != prompt.family:
            raise UserError(
                f"data.contrast: pair {quoted(prompt.pair)} lies in two families, {quoted(other.family)} "
                f"({other.where}) and {quoted(prompt.family)} ({prompt.where}); put both sides in one"
            )
