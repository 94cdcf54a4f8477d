"""Rehearsal: stage 1's contrastive loss kept up beside stage 2's.

Stage 2 trains all layers, and what stage 1 pulled apart at layer ℓ comes most of the way back (docs/study.md). A few
contrast prompts a step hold it: they ride in the first pack of each rank's step, so that no weight is gathered once
more for them, and the loss is stage 1's over their activations at ℓ, on all ranks together. Replay of an earlier task's
data is the oldest remedy for forgetting it (Robins, "Catastrophic forgetting, rehearsal and pseudorehearsal", 1995).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dcr_kernels import pool
from dcr_scale.config import AlignConfig, Rehearsed
from dcr_scale.contrastive import contrastive_loss
from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.data.packing import PackLayout
from dcr_scale.data.sampler import ContrastSampler, shard
from dcr_scale.errors import UserError
from dcr_scale.models.trunk import decoder_layers
from dcr_scale.world import World

_BATCH_SIZE = "align.rehearsal.batch_size"


def check_rehearsal(settings: AlignConfig, prompts: EncodedPrompts, *, prefix: int, seed: int, world: World) -> None:
    """Raise UserError where stage 2's contrast batches cannot be made or shared out, or fill its packs."""
    _sampler(settings.rehearsal.batch_size, prompts, seed, world)
    each = settings.rehearsal.batch_size // world.size
    tokens = each * sum(len(ids) - prefix for ids in prompts.ids) / len(prompts.ids)
    if tokens > settings.micro_batch_tokens / 2:
        raise UserError(
            f"{_BATCH_SIZE}={settings.rehearsal.batch_size} takes some {tokens:.0f} tokens on each of {world.size} "
            f"ranks, more than half of align.micro_batch_tokens={settings.micro_batch_tokens}: lower the one or raise "
            "the other"
        )


def _sampler(batch_size: int, prompts: EncodedPrompts, seed: int, world: World) -> ContrastSampler:
    shard(range(batch_size), world.rank, world.size, setting=_BATCH_SIZE)
    return ContrastSampler(
        prompts.prompts, batch_size=batch_size, toxic_share=0.5, sampling="independent", seed=seed, setting=_BATCH_SIZE
    )


class Rehearsal:
    """The contrastive term of stage 2's steps.

    Args:
        prompts: the contrast prompts that stage 1 trains on.
        model: the model that stage 2 trains; activations are taken where layer ℓ − 1 puts them out.
        prefix: how many leading tokens all prompts share.
    """

    def __init__(
        self, settings: Rehearsed, prompts: EncodedPrompts, model: nn.Module, *, prefix: int, seed: int, world: World
    ):
        self.settings, self.prompts, self.prefix, self.world = settings, prompts, prefix, world
        self._sampler = _sampler(settings.batch_size, prompts, seed, world)
        self._layer = decoder_layers(model)[settings.layer - 1]
        self._hidden: Tensor | None = None

    def share(self, step: int) -> list[int]:
        """This rank's contrast prompts of a step."""
        return self._share(step, self.world.rank)

    def _share(self, step: int, rank: int) -> list[int]:
        return shard(self._sampler.batch(step), rank, self.world.size, setting=_BATCH_SIZE)

    def tokens(self, step: int) -> int:
        """What a step's prompts add to a pack, beside the shared prefix, on the rank where they are longest."""
        return max(
            sum(len(self.prompts.ids[i]) - self.prefix for i in self._share(step, rank))
            for rank in range(self.world.size)
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The forward pass inside the context is the one that :meth:`loss` reads."""

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._hidden = output[0] if isinstance(output, tuple) else output

        handle = self._layer.register_forward_hook(keep)
        try:
            yield
        finally:
            # A recomputed layer runs again in the backward pass.
            handle.remove()

    def loss(self, share: Sequence[int], layout: PackLayout) -> Tensor:
        """Stage 1's loss over all ranks' rows, times its weight; see :func:`contrastive_loss` for its gradient.

        Args:
            share: this rank's prompts, which come first in the pack.
            layout: of the pack that the watched forward pass ran.
        """
        assert self._hidden is not None, "no forward pass was watched"
        hidden_TD, self._hidden = self._hidden.flatten(0, -2), None
        pooled_ND = pool(
            hidden_TD[layout.prefix : layout.starts[len(share)]],
            layout.cu_seqlens[: len(share) + 1],
            mode=self.settings.pooling,
        )
        labels_N = torch.tensor([int(self.prompts.prompts[i].label == "toxic") for i in share], device=hidden_TD.device)
        counts = [len(share)] * self.world.size
        return self.settings.weight * contrastive_loss(pooled_ND, labels_N, self.settings.loss, counts)
