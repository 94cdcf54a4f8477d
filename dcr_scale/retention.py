"""The retention term: general prompts keep the layer-ℓ activations they had before stage 1.

Reshaping the trunk could wash out what it knows; this holds it in place where nothing needs to change. Each rank keeps
the original activations of its own share of the prompts, in bf16, in memory or past a limit in a file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dcr_scale.data.packing import Pack, micro_batches, pack
from dcr_scale.data.sampler import ShuffledSampler
from dcr_scale.world import World

log = logging.getLogger(__name__)


class Retention:
    """Original activations of general prompts, and the distance of new ones from them.

    Prompt i belongs to rank i mod world size. A step's prompts are the same for any world size; each rank runs those
    that are its own.

    Args:
        encoded: token ids of all retained prompts, the same on every rank.
        prefix: leading tokens that all prompts share; their activations are retained too.
        batch_size: prompts a step, over all ranks.
        seed: of the order in which prompts are drawn.
    """

    def __init__(self, encoded: Sequence[Sequence[int]], *, prefix: int, batch_size: int, seed: int, world: World):
        self.encoded = list(encoded)
        self.prefix = prefix
        self.world = world
        self._sampler = ShuffledSampler(len(self.encoded), min(batch_size, len(self.encoded)), seed, "retention")
        self._own = [i for i in range(len(self.encoded)) if i % world.size == world.rank]
        lengths = [len(self.encoded[i]) - prefix for i in self._own]
        bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self._rows = {i: slice(start, stop) for i, start, stop in zip(self._own, bounds, bounds[1:], strict=False)}
        self._targets_TD = torch.empty(0)
        self._prefix_targets_PD = torch.empty(0)

    @torch.no_grad()
    def remember(
        self, activations: Callable[[Pack], Tensor], *, width: int, token_limit: int, memory_gib: float, spill: Path
    ) -> None:
        """Run every prompt once through the untrained trunk and keep its activations (bf16 [tokens, width]).

        They go to the file ``spill`` where this rank's share is larger than ``memory_gib``.
        """
        tokens = sum(len(self.encoded[i]) - self.prefix for i in self._own)
        with self.world.agreed(spill):
            if tokens * width * 2 > memory_gib * 2**30:
                log.info("retention: %.2f GiB of original activations go to disk", tokens * width * 2 / 2**30)
                self._targets_TD = _on_disk(spill, tokens * width).view(tokens, width)
            else:
                self._targets_TD = torch.empty(tokens, width, dtype=torch.bfloat16)
        for group in self._equal_passes(token_limit):
            batch = pack([self.encoded[i] for i in group], prefix=self.prefix, device=self.world.device)
            hidden_TD = activations(batch).to(torch.bfloat16).cpu()
            self._prefix_targets_PD = hidden_TD[: self.prefix].clone()
            for i, start, stop in zip(group, batch.layout.starts, batch.layout.starts[1:], strict=False):
                if i in self._rows:
                    self._targets_TD[self._rows[i]] = hidden_TD[start:stop]

    def _equal_passes(self, token_limit: int) -> list[list[int]]:
        """This rank's prompts in packs, as many packs on every rank: ZeRO-3 gathers for all or for none."""

        def packs(rank: int) -> list[list[int]]:
            share = list(range(rank, len(self.encoded), self.world.size)) or [0]
            costs = [len(self.encoded[i]) - self.prefix for i in share]
            return [[share[j] for j in group] for group in micro_batches(costs, world_size=1, limit=token_limit)[0]]

        most = max(len(packs(rank)) for rank in range(self.world.size))
        own = packs(self.world.rank)
        return own + own[:1] * (most - len(own))

    def batch(self, step: int, rank: int | None = None) -> list[int]:
        """A rank's prompts at a step, this one's unless another is given; may be empty."""
        rank = self.world.rank if rank is None else rank
        return [i for i in self._sampler.batch(step) if i % self.world.size == rank]

    def tokens(self, step: int) -> int:
        """Tokens the loss of a step is a mean over: those of all ranks, and the shared prefix once."""
        drawn = self._sampler.batch(step)
        return sum(len(self.encoded[i]) - self.prefix for i in drawn) + self.prefix

    def distance(self, hidden_TD: Tensor, prefix_PD: Tensor, drawn: Sequence[int], packs: int = 1) -> Tensor:
        """Σ over this rank's tokens of ‖h − h₀‖² / ‖h₀‖², float32 scalar. The prefix, which every rank runs, counts
        as one world-size-th on each, split over the packs of its step.

        Args:
            hidden_TD: new activations of the drawn prompts' own tokens, in order.
            prefix_PD: new activations of the shared prefix.
            drawn: the prompts, as :meth:`batch` gave them, or those of them in one of several packs.
            packs: how many packs this rank's step consists of.

        Each token's squared distance is taken relative to its own original norm: residual streams grow with depth and
        some tokens carry norms a hundred times the others', so that one absolute weight would fit no two models.
        """
        rows = [self._targets_TD[self._rows[i]] for i in drawn]
        target_TD = torch.cat([self._prefix_targets_PD, *rows]).to(hidden_TD.device, torch.float32)
        new_TD = torch.cat([prefix_PD, hidden_TD]).float()
        squared_T = (new_TD - target_TD).square().sum(-1)
        relative_T = squared_T / target_TD.square().sum(-1).clamp_min(1e-12)
        return relative_T[: self.prefix].sum() / (self.world.size * packs) + relative_T[self.prefix :].sum()


def _on_disk(path: Path, size: int) -> Tensor:
    """bf16 [size] in a file that vanishes with the tensor, however the process ends. Raises OSError on a full disk."""
    with path.open("wb") as file:
        # Reserved now: a write to a mapped file that finds no space is a SIGBUS.
        os.posix_fallocate(file.fileno(), 0, size * torch.bfloat16.itemsize)
    try:
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    finally:
        path.unlink()
