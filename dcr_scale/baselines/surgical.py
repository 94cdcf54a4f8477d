"""Surgical: ablation of the false refusal vector (arXiv 2410.03415).

With μ the mean residual stream at one depth and one token after the user's words,

    w = μ(refused seemingly toxic) - μ(harmless)        the false refusal vector,
    r = μ(refused toxic) - μ(harmless)                  the true refusal vector,
    v = w - λ (w · r̂) r̂                                 what is ablated, at all layers and tokens.

Each depth under the last fifth of the layers and each token of the template behind the user's words is a candidate.
Chosen is the one under which seemingly toxic validation prompts are refused least, among those that change the next
token of harmless validation prompts by a KL under a limit. Candidates are ranked on a few of the prompts first; the
best eight within the limit are judged on all. With λ = 1 refusals of toxic prompts keep what they share
with false ones; a smaller λ gives up some of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale.baselines.prompts import TRAIN, VALIDATION, Prompts, encode
from dcr_scale.baselines.residual import ablated, backbone, residual_writers
from dcr_scale.baselines.scores import Fitted, kl, mean, mean_residual, next_token_logits, refusals
from dcr_scale.baselines.steering import Applied, Steering
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation.refusal_probability import OpeningTree

log = logging.getLogger(__name__)

# More likely refused than not: the paper's filter of training prompts, a log-odds above 0.
_REFUSED = 0.5
_FATE = {True: "refused", False: "answered"}
# A mean over fewer would be noise.
_FEWEST = 32
# Refusals are most of the work: all candidates are judged on few prompts first, and the best on all of them.
_SCREENING, _FINALISTS = 8, 8
# Of the smaller of the two vectors that made it: what is left of a vector parallel to r, or of prompts that are
# the same up to there, is rounding.
_VANISHED = 1e-4


@dataclass(frozen=True)
class Surgical(Steering):
    """``vector`` float32 [D] was taken at the residual stream's depth ``depth``, ``position`` tokens from the end."""

    method: ClassVar[str] = "surgical"
    vector: Tensor
    depth: int
    position: int
    orthogonal: float

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector}

    def settings(self) -> dict[str, Any]:
        return {"depth": self.depth, "position": self.position, "orthogonal": self.orthogonal}

    @classmethod
    def restored(cls, layers: int, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Surgical:
        return cls(layers, tensors["vector"], settings["depth"], settings["position"], settings["orthogonal"])

    @contextmanager
    def _hooked(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[Applied]:
        with ablated(model, self.vector, residual_writers(model)):
            yield Applied()


def fit(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Prompts,
    *,
    kl_limit: float = 0.2,
    orthogonal: float = 1.0,
    deepest: float = 0.8,
    positions: int | None = None,
) -> Fitted:
    """Find the false refusal vector of a model, in one process.

    Args:
        model: in evaluation mode, whole, with an attention that takes padded rows.
        prompts: those of ``train`` that the model refuses (or answers, if harmless) make the vectors, at most 128 a
            set; at most 32 of ``validation`` judge them.
        kl_limit: mean KL, in nats, on harmless validation prompts' next token; the paper uses 0.1 to 0.2.
        orthogonal: λ.
        deepest: candidates lie at depths under this share of the layers.
        positions: how many tokens from the end are candidates; None: all that the template writes behind the user's
            words.

    Raises UserError where no candidate keeps within the limit.
    """
    encoded = encode(prompts, encoder)
    tree = OpeningTree.of_refusals(encoder)
    pools = {name: side.train[:TRAIN] for name, side in encoded.items()}
    chosen = {
        name: _drawn(pool, refusals(model, pool, tree), refused=name != "harmless") for name, pool in pools.items()
    }
    validation = {name: side.validation[:VALIDATION] for name, side in encoded.items()}
    suffix = shared_suffix(encoder)
    columns = list(range(-min(suffix, positions or suffix), 0))
    means = {name: mean_residual(model, kept, columns) for name, kept in chosen.items()}
    false_PLD, true_PLD = (means[name] - means["harmless"] for name in ("seemingly_toxic", "toxic"))
    layers = len(backbone(model)[1])
    candidates: list[tuple[dict[str, Any], Tensor]] = []
    for depth in range(math.ceil(deepest * layers)):
        for row, position in enumerate(columns):
            vector = orthogonalised(false_PLD[row, depth], true_PLD[row, depth], orthogonal)
            if vector is not None:
                candidates.append(({"depth": depth, "position": position}, vector))
    writers = residual_writers(model)
    _judge(model, candidates, writers, validation["seemingly_toxic"], validation["harmless"], tree, kl_limit)
    tried = [candidate for candidate, _ in candidates]
    best = choose(tried, kl_limit)
    winner = tried[best]
    steering = Surgical(layers, candidates[best][1].float().cpu(), winner["depth"], winner["position"], orthogonal)
    with ablated(model, steering.vector, writers):
        toxic_after = mean(refusals(model, validation["toxic"], tree))
    facts = {
        **winner,
        "kl_limit": kl_limit,
        "train_prompts": {name: len(kept) for name, kept in chosen.items()},
        "validation_prompts": {name: len(kept) for name, kept in validation.items()},
        "refusal_before": {name: mean(refusals(model, kept, tree)) for name, kept in validation.items()},
        "refusal_after": {"seemingly_toxic": winner["refusal"], "toxic": toxic_after},
    }
    return Fitted(steering, tried, facts)


def _judge(
    model: PreTrainedModel,
    candidates: list[tuple[dict[str, Any], Tensor]],
    writers: Sequence[nn.Module],
    seemingly_toxic: list[list[int]],
    harmless: list[list[int]],
    tree: OpeningTree,
    kl_limit: float,
) -> None:
    """Sort the candidates by their ``screening`` score, add ``kl`` in that order, and ``refusal`` to the finalists."""
    for candidate, vector in candidates:
        with ablated(model, vector, writers):
            candidate["screening"] = mean(refusals(model, seemingly_toxic[:_SCREENING], tree))
        log.info("%s", candidate)
    candidates.sort(key=lambda pair: pair[0]["screening"])
    unsteered = next_token_logits(model, harmless)
    finalists = 0
    for candidate, vector in candidates:
        with ablated(model, vector, writers):
            candidate["kl"] = kl(unsteered, next_token_logits(model, harmless))
            if candidate["kl"] <= kl_limit:
                candidate["refusal"] = mean(refusals(model, seemingly_toxic, tree))
                finalists += 1
        log.info("%s", candidate)
        if finalists == _FINALISTS:
            return


def orthogonalised(false_D: Tensor, true_D: Tensor, share: float) -> Tensor | None:
    """v = w - λ (w · r̂) r̂ as a unit vector, float64 [D]; None where nothing but rounding is left of it."""
    along = (false_D @ true_D) / (true_D @ true_D).clamp_min(torch.finfo(true_D.dtype).tiny)
    left_D = false_D - share * along * true_D
    length = left_D.norm()
    if length <= _VANISHED * false_D.norm() or not length > 0:
        return None
    return left_D / length


def choose(tried: Sequence[Mapping[str, Any]], kl_limit: float) -> int:
    """Index of the least refusing candidate within the limit. Raises UserError where there is none."""
    within = [i for i, candidate in enumerate(tried) if candidate.get("kl", math.inf) <= kl_limit]
    if not within:
        nearest = min((candidate["kl"] for candidate in tried if "kl" in candidate), default=math.nan)
        raise UserError(
            f"none of {len(tried)} candidates keeps within a KL of {kl_limit:g} on harmless prompts (the nearest: "
            f"{nearest:.3g}); raise --kl-limit, or give more prompts"
        )
    return min(within, key=lambda i: tried[i]["refusal"])


def shared_suffix(encoder: ChatEncoder) -> int:
    """How many trailing tokens every prompt shares, what the template puts behind the user's words; at least 1."""
    # Texts whose last tokens differ under any tokenizer, so that nothing of theirs counts.
    ends = [encoder.encode(text)[::-1] for text in ("a", "B?", "1", "é", "<")]
    shared = 0
    while all(len(ids) > shared and ids[shared] == ends[0][shared] for ids in ends):
        shared += 1
    return max(shared, 1)


def _drawn(encoded: list[list[int]], scores: Sequence[float], *, refused: bool) -> list[list[int]]:
    """The first 128 prompts that are refused (or are not); where they are few, those that come nearest to it."""
    fitting = [i for i, score in enumerate(scores) if (score > _REFUSED) == refused]
    if len(fitting) < min(_FEWEST, len(encoded)):
        log.info("%d of %d prompts are %s: the nearest are taken", len(fitting), len(scores), _FATE[refused])
        fitting = sorted(range(len(encoded)), key=lambda i: -scores[i] if refused else scores[i])[:_FEWEST]
    return [encoded[i] for i in fitting[:TRAIN]]
