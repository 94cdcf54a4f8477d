"""The contrastive loss of both stages: Circle or SupCon over the rows of all ranks."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch.distributed as dist
from torch import Tensor

from dcr_kernels import circle_loss, supcon_loss
from dcr_scale.config import LossConfig


def contrastive_loss(pooled_ND: Tensor, labels_N: Tensor, config: LossConfig, counts: list[int]) -> Tensor:
    """The loss over all ranks' rows: its value is the global batch's, its gradient this rank's share times the world
    size, as an engine that averages gradients needs it."""
    if config.name == "circle":
        loss = partial(circle_loss, margin=config.margin, gamma=config.gamma)
    else:
        loss = partial(supcon_loss, temperature=config.temperature)
    group = dist.group.WORLD if len(counts) > 1 else None
    # Statistics come with the loss only where they are asked for.
    return cast(Tensor, loss(pooled_ND, labels_N, group=group, counts=counts, scale_grad_by_world_size=True))
