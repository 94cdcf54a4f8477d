"""Stage 2's examples: general instructions, refusals of toxic prompts, answered seemingly toxic ones; the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from dcr_scale.config import DataConfig, Source
from dcr_scale.data.sources import listed, read_rows
from dcr_scale.data.splitting import draw, normalised, seeded_order, shared_prompts, split_by_family
from dcr_scale.errors import UserError

# The source of answered prompts that is the model itself.
OWN = "own"


@dataclass(frozen=True)
class Instruction:
    """A prompt with its answer; ``refusal`` says that the answer declines and the prompt is toxic. An empty response is
    still to be given by the model that will be trained."""

    prompt: str
    response: str
    refusal: bool
    family: str
    source: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class InstructionSet:
    """Neither side is empty, they share no family, and each is in seeded order."""

    train: tuple[Instruction, ...]
    heldout: tuple[Instruction, ...]


def load_general(data: DataConfig, seed: int) -> InstructionSet:
    """Read ``data.general`` and hold families out. Raises UserError."""
    return _load(data.general, "general", data, seed)


def load_refusals(data: DataConfig, seed: int) -> InstructionSet:
    """Read ``data.refusals`` and hold families out. Raises UserError."""
    return _load(data.refusals, "refusals", data, seed)


def load_answered(data: DataConfig, seed: int) -> tuple[Instruction, ...]:
    """Read ``data.answered``, all to train on: held-out contrast prompts show their effect. Raises UserError.

    The source ``own`` is left out: the run makes it (:mod:`dcr_scale.own_answers`).
    """
    return tuple(_read([source for source in data.answered if source.path != OWN], "general", seed))


def _load(
    sources: Sequence[Source], kind: Literal["general", "refusals"], data: DataConfig, seed: int
) -> InstructionSet:
    examples = _read(sources, kind, seed)
    train, heldout = split_by_family(
        examples,
        of_class=lambda instruction: kind,
        unit=_key,
        share=data.heldout,
        limit=data.heldout_limit,
        seed=seed,
        purpose=kind,
    )
    if not train or not heldout:
        raise UserError(
            f"data.{kind}: found {len(examples)} examples, all of one family; at least two families are needed, "
            f"one to train on and one to hold out"
        )
    sides = ([(one.prompt, one.where or one.source) for one in side] for side in (train, heldout))
    if shared := shared_prompts(*sides):
        raise UserError(
            f"data.{kind}: prompts in families on both sides of the held-out split: {listed(shared)}; give "
            f"both rows one family"
        )
    return InstructionSet(train, heldout)


def _read(sources: Sequence[Source], kind: Literal["general", "refusals"], seed: int) -> list[Instruction]:
    """All sources' rows, each prompt with each of its answers once."""
    instructions: list[Instruction] = []
    for source in sources:
        rows = [
            Instruction(
                prompt=row.values["prompt"],
                response=row.values["response"],
                refusal=kind == "refusals",
                # prompts that differ only in punctuation stay on one side
                family=row.values["family"] or normalised(row.values["prompt"]),
                source=source.path,
                where=row.where,
            )
            for row in read_rows(source, kind=kind)
        ]
        instructions += draw(rows, source.limit, _key, seed=seed, purpose="limit")
    # "2 + 3" and "2 - 3" have one normal form, and a prompt may well have several refusals
    first: dict[tuple[str, str], Instruction] = {}
    for instruction in instructions:
        first.setdefault((normalised(instruction.prompt), instruction.response), instruction)
    return list(first.values())


def _key(instruction: Instruction) -> str:
    return f"{instruction.prompt}\x1f{instruction.response}"


def build_mixture(
    general: Sequence[Instruction],
    refusals: Sequence[Instruction],
    answered: Sequence[Instruction] = (),
    *,
    examples: int | None,
    refusal_share: float,
    answered_share: float = 0.0,
    seed: int,
) -> list[Instruction]:
    """Stage 2's training examples, shuffled: ``examples`` of them, by rounded shares refusals and answered ones.

    Without ``examples`` as many as the sequences give at those shares, no example twice. A larger mixture of one seed
    contains the smaller, but for at most one answered example. Raises UserError with the numbers where the sequences
    have too few.
    """
    pools = _Pools(general, refusals, answered, refusal_share, answered_share)
    largest = pools.largest
    size = largest if examples is None else examples
    if size == 0 or not pools.fit(size):
        asked = "null" if examples is None else examples
        named = list(pools.named.items())[: 3 if answered_share else 2]
        wanted = _and([f"{count} {name}" for count, (name, _) in zip(pools.counts(size), named, strict=False)])
        found = _and([f"{len(pool)} {name}" for name, pool in named])
        shares = f"align.refusal_share={refusal_share}"
        if answered_share:
            shares += f" and align.answered_share={answered_share}"
        advice = f"set align.examples to {largest} or less, or " if largest else ""
        raise UserError(
            f"align.examples={asked} at {shares} needs {wanted if size else 'at least one example'}; found {found} to "
            f"train on; {advice}add sources or change the share"
        )
    chosen: list[Instruction] = []
    for purpose, pool, count in zip(
        ("general", "refusals", "answered"), pools.named.values(), pools.counts(size), strict=True
    ):
        chosen += seeded_order(pool, _key, seed=seed, purpose=f"mixture, {purpose}")[:count]
    return seeded_order(chosen, _key, seed=seed, purpose="mixture")


def what_runs_out(
    general: Sequence[Instruction],
    refusals: Sequence[Instruction],
    answered: Sequence[Instruction],
    *,
    refusal_share: float,
    answered_share: float,
) -> str:
    """Which of them, by its number and name, a mixture without a given size has no more of."""
    pools = _Pools(general, refusals, answered, refusal_share, answered_share)
    following = pools.counts(pools.largest + 1)
    short = {name: len(pool) for (name, pool), n in zip(pools.named.items(), following, strict=True) if n > len(pool)}
    return _and([f"{count} {name}" for name, count in short.items()])


class _Pools:
    """What a mixture is drawn from, and how many of each kind one of some size has."""

    def __init__(
        self,
        general: Sequence[Instruction],
        refusals: Sequence[Instruction],
        answered: Sequence[Instruction],
        refusal_share: float,
        answered_share: float,
    ):
        self.named = {
            "general instructions": general,
            "refusals": refusals,
            "answered seemingly toxic prompts": answered,
        }
        self._refusal_share, self._answered_share = refusal_share, answered_share
        self.largest = sum(1 for _ in takewhile(self.fit, range(1, sum(map(len, self.named.values())) + 1)))

    def counts(self, size: int) -> tuple[int, int, int]:
        refused = math.floor(size * self._refusal_share + 0.5)
        # the sum is rounded, so that the rest is never negative
        both = max(refused, math.floor(size * (self._refusal_share + self._answered_share) + 0.5))
        return size - both, refused, both - refused

    def fit(self, size: int) -> bool:
        return all(n <= len(pool) for n, pool in zip(self.counts(size), self.named.values(), strict=True))


def _and(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
