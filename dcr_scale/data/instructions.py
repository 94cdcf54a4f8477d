"""Stage 2's examples: general instructions, refusals of toxic prompts, answered seemingly toxic ones; the mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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


class MixturePools:
    """What stage 2's mixture is drawn from, and how many of each kind one of some size has.

    Attributes:
        largest: the most examples that a mixture has, no example twice; 0 where there is none.
    """

    def __init__(
        self,
        general: Sequence[Instruction],
        refusals: Sequence[Instruction],
        answered: Sequence[Instruction] = (),
        *,
        refusal_share: float,
        answered_share: float = 0.0,
    ):
        self.named = {
            "general instructions": general,
            "refusals": refusals,
            "answered seemingly toxic prompts": answered,
        }
        self._refusal_share, self._answered_share = refusal_share, answered_share
        # From above, as by rounding a size may fit though a smaller one does not; none does where a kind would be short
        # of its share by more than one example.
        shares = (1 - refusal_share - answered_share, refusal_share, answered_share)
        parts = zip(self.named.values(), shares, strict=True)
        bound = min((len(pool) + 1) / share for pool, share in parts if share > 0)
        total = sum(map(len, self.named.values()))
        self.largest = next(filter(self.fit, range(min(total, math.ceil(bound)), 0, -1)), 0)

    def counts(self, size: int) -> tuple[int, int, int]:
        """General instructions, refusals and answered prompts among ``size`` examples."""
        refused = math.floor(size * self._refusal_share + 0.5)
        # the sum is rounded, so that the rest is never negative
        both = max(refused, math.floor(size * (self._refusal_share + self._answered_share) + 0.5))
        return size - both, refused, both - refused

    def fit(self, size: int) -> bool:
        return all(n <= len(pool) for n, pool in zip(self.counts(size), self.named.values(), strict=True))

    def scarce(self) -> str:
        """Which of them, by its number and name, there are too few of for a mixture larger than the largest."""
        following = zip(self.named.items(), self.counts(self.largest + 1), strict=True)
        return _and([f"{len(pool)} {name}" for (name, pool), wanted in following if wanted > len(pool)])

    def wanted(self, examples: int | None) -> str:
        """What a mixture of ``examples`` needs and what there is, for whoever asked for too many."""
        size = self.largest if examples is None else examples
        asked = (
            f"align.examples={'null' if examples is None else examples} at align.refusal_share={self._refusal_share}"
        )
        named = list(self.named.items())[: 3 if self._answered_share else 2]
        if self._answered_share:
            asked += f" and align.answered_share={self._answered_share}"
        needed = _and([f"{count} {name}" for count, (name, _) in zip(self.counts(size), named, strict=False)])
        found = _and([f"{len(pool)} {name}" for name, pool in named])
        return f"{asked} needs {needed if size else 'at least one example'}; found {found} to train on"


def build_mixture(pools: MixturePools, *, examples: int | None, seed: int) -> list[Instruction]:
    """Stage 2's training examples, shuffled: ``examples`` of them, by rounded shares refusals and answered ones.

    Without ``examples`` as many as the pools give at those shares, no example twice. A larger mixture of one seed
    contains the smaller, but for at most one answered example. Raises UserError with the numbers where the pools have
    too few.
    """
    size = pools.largest if examples is None else examples
    if size == 0 or not pools.fit(size):
        advice = f"set align.examples to {pools.largest}, or " if pools.largest else ""
        raise UserError(f"{pools.wanted(examples)}; {advice}add sources or change the share")
    chosen: list[Instruction] = []
    for purpose, pool, count in zip(
        ("general", "refusals", "answered"), pools.named.values(), pools.counts(size), strict=True
    ):
        chosen += seeded_order(pool, _key, seed=seed, purpose=f"mixture, {purpose}")[:count]
    return seeded_order(chosen, _key, seed=seed, purpose="mixture")


def _and(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
