"""What a candidate is judged by while a baseline is fitted: refusal probability, and the harm done elsewhere.

Fitting runs in one process: every function here sees all prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dcr_scale.baselines.residual import left_padded, positions_of, residuals
from dcr_scale.baselines.steering import Steering
from dcr_scale.evaluation.refusal_probability import OpeningTree, opening_masses
from dcr_scale.world import World

BATCH = 16
# Attention over a row of trees is dense: long rows cost more than they save.
_TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class Fitted:
    """A steering, the table of candidates that it was chosen from, and the numbers of the fit, for the log."""

    steering: Steering
    tried: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


def batches(encoded: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """The prompts in order, a few at a time."""
    for at in range(0, len(encoded), BATCH):
        yield list(encoded[at : at + BATCH])


def residuals_of(model: PreTrainedModel, encoded: Sequence[list[int]], columns: Sequence[int]) -> Iterator[Tensor]:
    """:func:`~.residual.residuals` of all prompts, a batch at a time: float32 [B, P, L + 1, D]."""
    device = next(model.parameters()).device
    for batch in batches(encoded):
        yield residuals(model, *left_padded(batch, device), columns)


def mean_residual(model: PreTrainedModel, encoded: Sequence[list[int]], columns: Sequence[int]) -> Tensor:
    """The mean over prompts, float64 [P, L + 1, D]."""
    sums = [batch.double().sum(dim=0) for batch in residuals_of(model, encoded, columns)]
    return torch.stack(sums).sum(dim=0) / len(encoded)


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, encoded: Sequence[list[int]]) -> Tensor:
    """Logits of the answer's first token, float32 [N, V]."""
    device = next(model.parameters()).device
    found = []
    for batch in batches(encoded):
        ids, mask = left_padded(batch, device)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, logits_to_keep=1
        )
        found.append(output.logits[:, -1].float())
    return torch.cat(found)


def kl(before_NV: Tensor, after_NV: Tensor) -> float:
    """Mean of KL(before ‖ after) over prompts, in nats, from logits."""
    before, after = before_NV.log_softmax(-1), after_NV.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def refusals(model: PreTrainedModel, encoded: Sequence[list[int]], tree: OpeningTree) -> list[float]:
    """Refusal probability of each prompt (:mod:`~dcr_scale.evaluation.refusal_probability`)."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=next(model.parameters()).device)
    return opening_masses(model, encoded, tree, token_limit=_TOKENS_AT_ONCE, world=world)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
