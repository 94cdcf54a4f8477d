"""Which prompts of stage 1's step a rank runs in which pack."""

from __future__ import annotations

from dataclasses import dataclass

from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.data.packing import Pack, balanced_groups, micro_batches, pack
from dcr_scale.data.sampler import ContrastSampler, shard
from dcr_scale.retention import Retention
from dcr_scale.world import World


@dataclass(frozen=True)
class ContrastPack:
    """The pack ``number`` of one rank's share of a step: rows of its contrast prompts and of its retained ones, which
    lie behind the shared prefix in this order. Either may be none."""

    step: int
    number: int
    contrast: list[int]
    retained: list[int]
    batch: Pack


class ContrastPacks:
    """Cuts steps into packs.

    Args:
        train: the prompts that ``sampler`` draws from.
        prefix: how many leading tokens all prompts share.
        limit: tokens of a pack at most, unless one prompt has more; None: one pack a step.
    """

    def __init__(
        self,
        train: EncodedPrompts,
        sampler: ContrastSampler,
        retention: Retention | None,
        *,
        prefix: int,
        limit: int | None,
        world: World,
    ):
        self.train, self.sampler, self.retention = train, sampler, retention
        self.prefix, self.limit, self.world = prefix, limit, world

    def of_step(self, step: int) -> list[ContrastPack]:
        """This rank's packs, as many on every rank: ZeRO-3 gathers for all or for none."""
        shares = [self._share(step, rank) for rank in range(self.world.size)]
        contrast, retained = shares[self.world.rank]
        count = 1
        if self.limit is not None:
            costs = [self._costs(*share) for share in shares]
            needed = max(len(micro_batches(own, world_size=1, limit=self.limit)[0]) for own in costs)
            count = min(needed, *(len(own) for own in costs))
        first = len(contrast)
        return [
            self._pack(
                step,
                number,
                [contrast[i] for i in group if i < first],
                [retained[i - first] for i in group if i >= first],
            )
            for number, group in enumerate(balanced_groups(self._costs(contrast, retained), count))
        ]

    def _share(self, step: int, rank: int) -> tuple[list[int], list[int]]:
        """A rank's contrast prompts and retained prompts."""
        contrast = shard(self.sampler.batch(step), rank, self.world.size)
        return contrast, self.retention.batch(step, rank) if self.retention is not None else []

    def _sequences(self, contrast: list[int], retained: list[int]) -> list[list[int]]:
        kept = [list(self.retention.encoded[i]) for i in retained] if self.retention is not None else []
        return [*(self.train.ids[i] for i in contrast), *kept]

    def _costs(self, contrast: list[int], retained: list[int]) -> list[int]:
        """Tokens of each prompt beside the shared prefix."""
        return [len(sequence) - self.prefix for sequence in self._sequences(contrast, retained)]

    def _pack(self, step: int, number: int, contrast: list[int], retained: list[int]) -> ContrastPack:
        batch = pack(self._sequences(contrast, retained), prefix=self.prefix, device=self.world.device)
        return ContrastPack(step, number, contrast, retained, batch)
