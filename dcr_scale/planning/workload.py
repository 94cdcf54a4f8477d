"""How many tokens a step brings to a rank: from the run's own data where it can be tokenised, else from stated ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcr_scale.config import AlignConfig, Config, RefineConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.packing import balanced_groups, micro_batches
from dcr_scale.errors import UserError
from dcr_scale.models.loading import read_tokenizer
from dcr_scale.run_data import load_data


@dataclass(frozen=True)
class Assumed:
    """Lengths for prompts that cannot be tokenised: tokens of the template's beginning, of a prompt after it, and of an
    example after it, answer included; and how many prompts and examples, where the data cannot be read either."""

    contrast: int = 750
    prefix: int = 30
    prompt: int = 20
    example: int = 220
    examples: int = 20_000


@dataclass(frozen=True)
class Lengths:
    """Tokens of the run's prompts after the ``prefix`` that all of them share.

    Attributes:
        contrast: of stage 1's training prompts.
        general: of the retained prompts.
        examples: of stage 2's examples, with their answers.
        responses: of those, the answers.
        note: where the numbers come from.
    """

    prefix: int
    contrast: tuple[int, ...]
    general: tuple[int, ...]
    examples: tuple[int, ...]
    responses: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class Work:
    """One step of the rank that has most to do, as a typical step has it.

    Attributes:
        steps: optimiser steps of the stage, at most.
        packs: own tokens of the contrast prompts (or examples) in each pack.
        beside: own tokens of other prompts in each pack: stage 1's retained, stage 2's rehearsed ones.
        responses: tokens of the largest pack on which a loss is taken.
        twice: the forward passes run once before, without gradients.
        batch: prompts of a step over all ranks.
    """

    prefix: int
    steps: int
    packs: tuple[tuple[int, ...], ...]
    beside: tuple[tuple[int, ...], ...]
    responses: tuple[int, ...]
    twice: bool
    batch: int
    note: str = field(default="")

    @property
    def tokens(self) -> int:
        """Tokens of all packs."""
        return sum(self.prefix + sum(pack) for pack in self.all_packs)

    @property
    def all_packs(self) -> list[tuple[int, ...]]:
        """The tokens of each pack's prompts, whatever they are for."""
        return [(*own, *kept) for own, kept in zip(self.packs, self.beside, strict=True)]

    @property
    def largest(self) -> int:
        """The pack with most tokens."""
        return max(range(len(self.packs)), key=lambda i: sum(self.all_packs[i]))


def measure_lengths(config: Config, folder: Path | None, assumed: Assumed) -> Lengths:
    """Token counts of the run's data. Without a ``folder`` that holds a tokenizer, or without the data, assumed ones.

    Raises UserError for what the run itself would refuse in data that can be read.
    """
    if folder is not None:
        return _measured(config, folder)
    try:
        data = load_data(config)
    except UserError as error:
        note = (
            f"the data cannot be read here ({error}); {assumed.contrast:,} contrast prompts of {assumed.prompt} tokens "
            f"and {assumed.examples:,} examples of {assumed.example} assumed, after a template's {assumed.prefix}"
        )
        return _assumed(config, assumed.contrast, assumed.examples, assumed, note)
    note = (
        f"no tokenizer here; a prompt is taken to have {assumed.prompt} tokens after a template's {assumed.prefix}, an "
        f"example {assumed.example}"
    )
    return _assumed(config, len(data.contrast.train), len(data.mixture), assumed, note)


def _measured(config: Config, folder: Path) -> Lengths:
    data, tokenizer = load_data(config), read_tokenizer(folder, config.model)
    encoder = ChatEncoder.configured(tokenizer, config.data)
    prefix = encoder.prefix

    def own(prompts: list[str], what: str) -> tuple[int, ...]:
        return tuple(len(ids) - prefix for ids in encoder.encode_prompts(prompts, what) if ids is not None)

    kept = config.refine.retention.prompts if config.refine is not None else 0
    examples = []
    if config.align is not None:
        mixture = [example for example in data.mixture if example.response]
        fits = encoder.encode_prompts([example.prompt for example in mixture], "stage 2's prompts")
        for example, ids in zip(mixture, fits, strict=True):
            if ids is not None:
                encoded = encoder.encode_example(example.prompt, example.response, max_tokens=config.align.max_tokens)
                examples += [] if encoded is None else [encoded]
    # The model has yet to answer these, with as many tokens as the limit at most.
    asked = own([example.prompt for example in data.mixture if not example.response], "prompts to answer")
    room = config.align.max_tokens - prefix if config.align is not None else 0
    asked = tuple(length for length in asked if length < room)
    answers = [min(config.data.answer_tokens, room - length) for length in asked]
    return Lengths(
        prefix,
        own([prompt.text for prompt in data.contrast.train], "contrast prompts"),
        own([instruction.prompt for instruction in data.general.train[:kept]], "general prompts"),
        (
            *(len(example.ids) - prefix for example in examples),
            *(length + answer for length, answer in zip(asked, answers, strict=True)),
        ),
        (*(len(example.ids) - example.response_start for example in examples), *answers),
        "the run's own data and tokenizer",
    )


def _assumed(config: Config, contrast: int, examples: int, assumed: Assumed, note: str) -> Lengths:
    kept = config.refine.retention.prompts if config.refine is not None else 0
    return Lengths(
        assumed.prefix,
        (assumed.prompt,) * contrast,
        (assumed.prompt,) * kept,
        (assumed.example,) * examples,
        (max(1, assumed.example - assumed.prompt),) * examples,
        note,
    )


def refine_work(lengths: Lengths, settings: RefineConfig, gpus: int) -> Work:
    """Stage 1's step on ``gpus`` ranks. A batch that does not divide over them is taken to grow."""
    batch = math.ceil(settings.batch_size / gpus) * gpus
    own = [lengths.contrast[i] for i in _spread(lengths.contrast, math.ceil(batch / gpus))]
    drawn = min(settings.retention.batch_size, len(lengths.general)) if settings.retention.weight else 0
    kept = [lengths.general[i] for i in _spread(lengths.general, math.ceil(drawn / gpus))]
    costs, limit = [*own, *kept], settings.micro_batch_tokens
    # As many packs as every rank can fill; the one with the fewest prompts decides.
    fewest = batch // gpus + drawn // gpus
    count = 1 if limit is None else min(fewest, len(micro_batches(costs, world_size=1, limit=limit)[0]))
    groups = balanced_groups(costs, count)
    return Work(
        prefix=lengths.prefix,
        steps=settings.steps,
        packs=tuple(tuple(costs[i] for i in group if i < len(own)) for group in groups),
        beside=tuple(tuple(costs[i] for i in group if i >= len(own)) for group in groups),
        responses=tuple(0 for _ in groups),
        twice=count > 1,
        batch=batch,
        note=_grown(settings.batch_size, batch, "refine.batch_size", refused=batch < 2 * settings.batch_size),
    )


def align_work(lengths: Lengths, settings: AlignConfig, gpus: int) -> Work:
    """Stage 2's step on ``gpus`` ranks. A batch that leaves ranks without examples is taken to grow likewise, and so is
    one of rehearsed prompts that does not divide over them."""
    batch = max(min(settings.batch_size, len(lengths.examples)), gpus)
    order = _spread(lengths.examples, batch)
    costs = [lengths.examples[i] for i in order]
    share, notes = 0, [_grown(settings.batch_size, batch, "align.batch_size", refused=False)]
    if settings.rehearsal.weight:
        share, asked = math.ceil(settings.rehearsal.batch_size / gpus), settings.rehearsal.batch_size
        notes.append(_grown(asked, share * gpus, "align.rehearsal.batch_size", refused=True))
    # They ride in every rank's first pack.
    rehearsed = tuple(lengths.contrast[i] for i in _spread(lengths.contrast, share))
    plan = micro_batches(costs, world_size=gpus, limit=settings.micro_batch_tokens, beside=sum(rehearsed))
    busiest = max(plan, key=lambda packs: sum(costs[i] for pack in packs for i in pack))
    return Work(
        prefix=lengths.prefix,
        steps=max(1, math.ceil(settings.epochs * len(lengths.examples) / batch)),
        packs=tuple(tuple(costs[i] for i in pack) for pack in busiest),
        beside=(rehearsed, *(() for _ in busiest[1:])),
        responses=tuple(sum(lengths.responses[order[i]] for i in pack) for pack in busiest),
        twice=False,
        batch=batch,
        note="; ".join(filter(None, notes)),
    )


def _grown(asked: int, planned: int, setting: str, *, refused: bool) -> str:
    why = "which the run refuses on so many GPUs" if refused else "fewer than the GPUs"
    return f"{setting} is {asked}, {why}: planned for {planned}" if planned > asked else ""


def _spread(lengths: Sequence[int], count: int) -> list[int]:
    """The places of ``count`` of the lengths, evenly spread over them in order of size: what a batch has on average."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]
