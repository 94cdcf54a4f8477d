"""The contrastive loss: Circle or SupCon over the pooled rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dcr_kernels import circle_loss, pool, supcon_loss
from dcr_scale.config import LossConfig
from dcr_scale.data.contrast import ContrastPrompt
from dcr_scale.data.packing import PackLayout


def pooled_rows(hidden_TD: Tensor, layout: PackLayout, count: int, mode: Literal["last", "mean"]) -> Tensor:
    """Unit rows float32 [count, D] of a pack's first ``count`` prompts."""
    if not count:
        return hidden_TD.new_zeros(0, hidden_TD.shape[1], dtype=torch.float32)
    return pool(hidden_TD[layout.prefix : layout.starts[count]], layout.cu_seqlens[: count + 1], mode=mode)


def contrastive_loss(
    pooled_ND: Tensor, prompts: Sequence[ContrastPrompt], config: LossConfig, world_size: int
) -> Tensor:
    """The loss over all ranks' rows, as many on each: its value is the global batch's, its gradient this rank's share
    times the world size, as an engine that averages gradients needs it.

    ``prompts``: those of this rank's rows.
    """
    labels_N = torch.tensor([int(prompt.label == "toxic") for prompt in prompts], device=pooled_ND.device)
    counts = [len(prompts)] * world_size
    if config.name == "circle":
        loss = partial(circle_loss, margin=config.margin, gamma=config.gamma)
    else:
        loss = partial(supcon_loss, temperature=config.temperature)
    group = dist.group.WORLD if len(counts) > 1 else None
    # Statistics come with the loss only where they are asked for.
    return cast(Tensor, loss(pooled_ND, labels_N, group=group, counts=counts, scale_grad_by_world_size=True))
