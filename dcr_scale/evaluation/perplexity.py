"""Perplexity on answers that a model was not trained on: what it knows of general instructions still.

exp of the mean −log p over the answers' tokens, the end of the turn among them, each given its prompt and what stands
before it.

Shape suffixes: N rows of the batch, S tokens of its longest prompt, A tokens of its longest answer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale.data.chat import EncodedExample
from dcr_scale.evaluation.generation import batches, dense_attention
from dcr_scale.evaluation.intervals import Interval, bootstrap
from dcr_scale.world import World

if TYPE_CHECKING:
    from dcr_scale.baselines import Applied, Steering

# Logits of whole answers are what fills the memory.
_ROWS = 8


@dataclass(frozen=True)
class Perplexity:
    """Of ``tokens`` tokens of ``examples`` answers; the interval is a bootstrap over those."""

    interval: Interval
    examples: int
    tokens: int

    @classmethod
    def of(cls, losses: Sequence[float], tokens: Sequence[int]) -> Perplexity:
        """From each answer's summed −log p, in nats, and its number of tokens."""
        losses_N, tokens_N = np.array(losses), np.array(tokens)

        def perplexity(at: Mapping[str, np.ndarray]) -> float:
            return math.exp(losses_N[at["example"]].sum() / tokens_N[at["example"]].sum())

        return cls(bootstrap(perplexity, {"example": len(losses_N)}), len(losses_N), int(tokens_N.sum()))

    def as_dict(self) -> dict[str, Any]:
        found = {name: round(value, 4) for name, value in self.interval.as_dict().items()}
        return {**found, "examples": self.examples, "tokens": self.tokens}


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    *,
    partitioned: bool,
    world: World,
    steering: Steering | None = None,
) -> Perplexity:
    """The perplexity of the examples' answers, the same on every rank.

    Args:
        model: in evaluation mode, the same on every rank or spread over them (``partitioned``).
        examples: at least one, the same on all ranks.
    """
    own: dict[int, float] = {}
    plan = batches([len(example.ids) for example in examples], _ROWS, world.size)
    applied = steering.applied(model, tokenizer) if steering is not None else nullcontext()
    with dense_attention(model), applied as hooks:
        for at in range(0, len(plan), world.size):
            group = plan[at : at + world.size]
            counts = world.rank < len(group)
            if not counts and not partitioned:
                continue
            # Where passes are collectives, a rank without examples runs another's, uncounted.
            batch = group[world.rank] if counts else group[-1]
            losses = _losses(model, [examples[i] for i in batch], world.device, hooks)
            if counts:
                own.update(zip(batch, losses.tolist(), strict=True))
    found = {i: loss for share in world.gather(own) for i, loss in share.items()}
    tokens = [len(example.ids) - example.response_start for example in examples]
    return Perplexity.of([found[i] for i in range(len(examples))], tokens)


def _losses(
    model: PreTrainedModel, examples: Sequence[EncodedExample], device: torch.device, hooks: Applied | None
) -> Tensor:
    """Σ of −log p over each example's answer: float64 [N]."""
    prompts = [example.ids[: example.response_start] for example in examples]
    answers = [example.ids[example.response_start :] for example in examples]
    longest = max(map(len, prompts))
    furthest = max(map(len, answers))
    # Prompts end together, so that answers begin together.
    ids = [
        [0] * (longest - len(prompt)) + prompt + answer + [0] * (furthest - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    mask = [
        [0] * (longest - len(prompt)) + [1] * (len(prompt) + len(answer)) + [0] * (furthest - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ids_NL, mask_NL = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    fixed = hooks.decided(ids_NL[:, :longest], mask_NL[:, :longest]) if hooks is not None else nullcontext()
    with fixed:
        logits = model(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            position_ids=(mask_NL.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=furthest + 1,
        ).logits
    logits_NAV, targets_NA = logits[:, :-1].float(), ids_NL[:, longest:]
    losses_NA = F.cross_entropy(logits_NAV.flatten(0, 1), targets_NA.flatten(), reduction="none").view_as(targets_NA)
    return (losses_NA.double() * mask_NL[:, longest:]).sum(dim=1)
