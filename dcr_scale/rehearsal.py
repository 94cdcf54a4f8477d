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

from torch import Tensor, nn

from dcr_scale.config import AlignConfig, Rehearsed
from dcr_scale.contrastive import contrastive_loss, pooled_rows
from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.data.packing import PackLayout
from dcr_scale.data.sampler import ContrastSampler, shard
from dcr_scale.errors import UserError
from dcr_scale.models.trunk import decoder_layers
from dcr_scale.world import World

_BATCH_SIZE = "align.rehearsal.batch_size"


def check_rehearsal(settings: AlignConfig, prompts: EncodedPrompts, *, prefix: int, seed: int, world: World) -> int:
    """Tokens of rehearsed prompts on a rank, in the mean over steps.

    Raises UserError where stage 2's contrast batches cannot be made or shared out, or leave no room in its packs.
    """
    size = settings.rehearsal.batch_size
    _sampler(size, prompts, seed, world)
    tokens = round(size / world.size * sum(len(ids) - prefix for ids in prompts.ids) / len(prompts.ids))
    if tokens >= settings.micro_batch_tokens:
        raise UserError(
            f"{_BATCH_SIZE}={size} takes some {tokens} tokens on each rank (world size {world.size}), and "
            f"align.micro_batch_tokens={settings.micro_batch_tokens} leaves no room beside them: lower the one or "
            "raise the other"
        )
    return tokens


def _sampler(batch_size: int, prompts: EncodedPrompts, seed: int, world: World) -> ContrastSampler:
    shard(range(batch_size), world.rank, world.size, setting=_BATCH_SIZE)
    return ContrastSampler(prompts.prompts, batch_size=batch_size, toxic_share=0.5, sampling="independent", seed=seed)


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

    def of_step(self, step: int) -> tuple[list[int], int]:
        """This rank's contrast prompts of a step; and what a rank's add to its first pack, beside the shared prefix, at
        most."""
        drawn = self._sampler.batch(step)
        shares = [shard(drawn, rank, self.world.size, setting=_BATCH_SIZE) for rank in range(self.world.size)]
        most = max(sum(len(self.prompts.ids[i]) - self.prefix for i in share) for share in shares)
        return shares[self.world.rank], most

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
        """Stage 1's loss over all ranks' rows, without its weight; see :func:`contrastive_loss` for its gradient.

        Args:
            share: this rank's prompts, which come first in the pack.
            layout: of the pack that the watched forward pass ran.
        """
        assert self._hidden is not None, "no forward pass was watched"
        hidden_TD, self._hidden = self._hidden.flatten(0, -2), None
        pooled_ND = pooled_rows(hidden_TD, layout, len(share), self.settings.pooling)
        prompts = [self.prompts.prompts[i] for i in share]
        return contrastive_loss(pooled_ND, prompts, self.settings.loss, self.world.size)
