"""Which rows make up a step: pure functions of the seed and the step number.

A global batch is the same for any world size, each rank takes its contiguous shard of it, and a run resumes
from the step number alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeVar

from dcr_scale.config import Label
from dcr_scale.data.contrast import ContrastPrompt
from dcr_scale.data.sources import quoted
from dcr_scale.errors import UserError

Item = TypeVar("Item")


class ShuffledSampler:
    """Batches cut out of an endless stream of reshuffled epochs: every index once an epoch, none dropped.

    A batch may span two epochs (or more, where ``batch_size`` exceeds ``n``). The later epoch then begins
    with indices that the batch does not have yet, provided that ``n >= 2 * batch_size``: no index twice in a
    batch.
    """

    def __init__(self, n: int, batch_size: int, seed: int, purpose: str = "") -> None:
        self.n = n
        self.batch_size = batch_size
        # a batch may spill from one epoch into the next
        self._epoch = lru_cache(maxsize=2)(self._shuffled)
        self._key = f"{seed} {purpose}"

    @property
    def steps_per_epoch(self) -> float:
        """Steps in one pass over all indices; not whole where the batch does not divide them."""
        return self.n / self.batch_size

    def batch(self, step: int) -> list[int]:
        """The indices of one global batch, for any ``step >= 0``."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(position // self.n)[position % self.n] for position in positions]

    def _shuffled(self, epoch: int) -> list[int]:
        order = self._random_order(epoch)
        spilled = epoch * self.n % self.batch_size
        if spilled and self.n >= 2 * self.batch_size:
            # Only the head and the whole batches behind it change places, so the tail, which is all that the
            # next epoch looks at, is the plain shuffle's: no epoch depends on one before the last.
            earlier = set(self._random_order(epoch - 1)[-spilled:])
            head = self.batch_size - spilled
            fresh = (i for i in range(head, self.n) if order[i] not in earlier)
            for i in range(head):
                if order[i] in earlier:
                    j = next(fresh)
                    order[i], order[j] = order[j], order[i]
        return order

    def _random_order(self, epoch: int) -> list[int]:
        order = list(range(self.n))
        random.Random(f"{self._key} {epoch}").shuffle(order)
        return order


class ContrastSampler:
    """Batches with the same number of toxic prompts each, and each class in reshuffled epochs.

    ``matched`` is how prompts are drawn: True puts both sides of a pair in one batch, side by side. Within a
    batch the classes are spread evenly, so that the counts of any class in two equal contiguous shards differ
    by at most one.
    """

    def __init__(
        self,
        prompts: Sequence[ContrastPrompt],
        *,
        batch_size: int,
        toxic_share: float,
        sampling: Literal["auto", "matched", "independent"],
        seed: int,
    ) -> None:
        """Raises UserError where a batch or class is too small, or ``matched`` is asked for and cannot be."""
        self.batch_size = batch_size
        self.toxic = math.floor(batch_size * toxic_share + 0.5)
        if not 2 <= self.toxic <= batch_size - 2:
            raise UserError(
                f"refine.batch_size={batch_size} at refine.toxic_share={toxic_share} gives {self.toxic} "
                f"toxic and {batch_size - self.toxic} seemingly toxic prompts; each class needs two a step "
                f"for a positive pair: enlarge the batch or move the share towards 0.5"
            )
        self._toxic_rows = _rows_of("toxic", prompts)
        self._seemingly_rows = _rows_of("seemingly_toxic", prompts)
        obstacle = "" if sampling == "independent" else self._pair_up(prompts)
        if sampling == "matched" and obstacle:
            raise UserError(f"refine.sampling=matched: {obstacle}; mend that or set it to auto or independent")
        self.matched = sampling != "independent" and not obstacle
        seemingly = batch_size - self.toxic
        self._seemingly_draw = ShuffledSampler(len(self._seemingly_rows), seemingly, seed, "seemingly_toxic")
        self._toxic_draw = ShuffledSampler(len(self._toxic_rows), self.toxic, seed, "toxic")

    def batch(self, step: int) -> list[int]:
        """Indices into ``prompts`` of one global batch, for any ``step >= 0``."""
        seemingly_draw = self._seemingly_draw.batch(step)
        toxic_draw = seemingly_draw if self.matched else self._toxic_draw.batch(step)
        seemingly = [self._seemingly_rows[i] for i in seemingly_draw]
        toxic = [self._toxic_rows[i] for i in toxic_draw]
        toxic_before = [place * self.toxic // self.batch_size for place in range(self.batch_size + 1)]
        return [
            toxic[count] if toxic_before[place + 1] > count else seemingly[place - count]
            for place, count in enumerate(toxic_before[:-1])
        ]

    def _pair_up(self, prompts: Sequence[ContrastPrompt]) -> str:
        """Put the two sides of a pair at one place of either class's rows, or return why that cannot be."""
        if 2 * self.toxic != self.batch_size:
            return f"a batch of {self.batch_size} with {self.toxic} toxic prompts is not half and half"
        toxic_of = {prompts[i].pair: i for i in self._toxic_rows if prompts[i].pair is not None}
        seemingly_pairs = {prompts[i].pair for i in self._seemingly_rows}
        alone = [i for i in self._seemingly_rows if prompts[i].pair not in toxic_of]
        alone += [i for i in self._toxic_rows if prompts[i].pair is None or prompts[i].pair not in seemingly_pairs]
        if alone:
            first = prompts[alone[0]]
            return f"{len(alone)} prompts have no partner, such as {quoted(first.text)} ({first.where})"
        self._toxic_rows = [toxic_of[prompts[i].pair] for i in self._seemingly_rows]
        return ""


def _rows_of(label: Label, prompts: Sequence[ContrastPrompt]) -> list[int]:
    rows = [i for i, prompt in enumerate(prompts) if prompt.label == label]
    if not rows:
        raise UserError(f"no {label} prompts are left to train on; check data.contrast and data.max_prompt_tokens")
    return rows


def shard(batch: Sequence[Item], rank: int, world_size: int, *, setting: str = "batch_size") -> list[Item]:
    """One rank's contiguous share of a global batch. Raises UserError where the shares would be unequal.

    ``setting`` is the configuration's key for the batch's size, for the message.
    """
    size, remainder = divmod(len(batch), world_size)
    if remainder:
        nearest = " or ".join(str(count * world_size) for count in (size, size + 1) if count)
        raise UserError(
            f"{setting}={len(batch)} does not divide over {world_size} ranks; set it to {nearest}, or use "
            f"another number of ranks"
        )
    return list(batch[rank * size : (rank + 1) * size])
