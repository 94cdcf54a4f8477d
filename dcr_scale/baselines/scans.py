"""SCANS: safety-conscious activation steering (arXiv 2408.11491).

With h_l(q) the output of layer l at the last token of prompt q, and h_l(q + s) at the last token of the agreeing words
s = "Sure" behind it:

    v_l = mean over toxic anchors of h_l(q) - mean over harmless ones, as a unit vector,
    t_l(q) = h_l(q) - h_l(q + s), the transition,
    σ(q) = mean over l, from the first steered layer on, of cos(t_l(q), mean of t_l over toxic anchors).

Where σ(q) reaches the threshold the prompt is taken for toxic, and α v_l is added to the outputs of the middle layers
at its last token and all that is generated; else α v_l is subtracted.

The paper steers layers 10 to 19 of 32 by α = 3.5 with a threshold of .75, fitted to models of 7B and 13B. Both depend
on the model, the scale of its activations above all, so :func:`fit` chooses them anew on validation prompts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale.baselines.prompts import VALIDATION, EncodedSet, Prompts, encode
from dcr_scale.baselines.residual import backbone, on_output, removed, residuals
from dcr_scale.baselines.scores import Fitted, kl, mean, next_token_logits, refusals, residuals_of
from dcr_scale.baselines.steering import Applied, Steering
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation.refusal_probability import OpeningTree

log = logging.getLogger(__name__)

AGREEMENT = "Sure"
ANCHORS = 64
# Layers 10 to 19 of 32, as shares of the depth.
_FIRST, _BEHIND = 10 / 32, 20 / 32
# α is tried in these multiples of the distance between the classes' means, and at the paper's own value.
_MULTIPLES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
PAPER_ALPHA, PAPER_THRESHOLD = 3.5, 0.75


@dataclass(frozen=True)
class Scans(Steering):
    """Steering of layers ``first`` to ``first + N - 1``.

    ``vectors`` float32 [N, D]: unit steering vectors of those layers. ``references`` float32 [M, D]: mean transition
    of toxic anchors at the layers from ``first`` to the last.
    """

    method: ClassVar[str] = "scans"
    vectors: Tensor
    references: Tensor
    first: int
    alpha: float
    threshold: float

    def tensors(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors, "references": self.references}

    def settings(self) -> dict[str, Any]:
        return {"first": self.first, "alpha": self.alpha, "threshold": self.threshold}

    @classmethod
    def restored(cls, layers: int, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Scans:
        names = ("first", "alpha", "threshold")
        return cls(layers, tensors["vectors"], tensors["references"], *(settings[name] for name in names))

    def similarities(self, transitions_NMD: Tensor) -> Tensor:
        """σ of each prompt, float32 [N], from its transitions at the layers from ``first`` on."""
        references_MD = self.references.to(transitions_NMD.device)
        return F.cosine_similarity(transitions_NMD, references_MD[None], dim=-1).mean(dim=-1)

    @contextmanager
    def _hooked(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Iterator[ScansApplied]:
        agreement = ChatEncoder(tokenizer).encode_opening(AGREEMENT)
        applied = ScansApplied(self, model, agreement)
        with removed(applied.install()):
            yield applied


class ScansApplied(Applied):
    """SCANS in force on one model.

    A pass without anything in its cache begins new prompts: they are run once more, unsteered and with the agreement
    behind them, to decide each row's sign. Later passes behind a cache keep the signs, row by row.
    """

    def __init__(self, steering: Scans, model: nn.Module, agreement: Sequence[int]):
        self.steering, self.model, self.agreement = steering, model, list(agreement)
        self.owner, self.layers = backbone(model)
        # float32 [B], and the first column that is steered: the prompts' last token.
        self.signs_B: Tensor | None = None
        self.start = 0
        self._held = self._deciding = False
        self._columns_S: Tensor | None = None

    def install(self) -> list[torch.utils.hooks.RemovableHandle]:
        """The hooks, in force from now on."""
        handles = [self.owner.register_forward_pre_hook(self._before_pass, with_kwargs=True)]
        for number, vector_D in enumerate(self.steering.vectors, start=self.steering.first):
            handles.append(on_output(self.layers[number], partial(self._steered, vector_D)))
        return handles

    def keep(self, rows: Sequence[int] | Tensor) -> None:
        if self.signs_B is not None:
            self.signs_B = self.signs_B[torch.as_tensor(rows, device=self.signs_B.device)]

    @contextmanager
    def decided(self, input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        with self.fixed(self.signs(input_ids, attention_mask), input_ids.shape[1] - 1):
            yield

    @contextmanager
    def fixed(self, signs_B: Tensor, start: int) -> Iterator[None]:
        """Steer all passes inside by given signs (+1 toward refusal, -1 away), from column ``start`` on."""
        before = self.signs_B, self.start, self._held
        self.signs_B, self.start, self._held = signs_B, start, True
        try:
            yield
        finally:
            self.signs_B, self.start, self._held = before

    def signs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """+1 for each left-padded prompt that is taken for toxic, else -1: float32 [B]."""
        found_BMD = self.transitions(input_ids, attention_mask)
        toxic_B = self.steering.similarities(found_BMD) >= self.steering.threshold
        return toxic_B.float() * 2 - 1

    def transitions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """t of each left-padded prompt at the layers from ``first`` on, unsteered: float32 [B, M, D]."""
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("SCANS reads a prompt's last token in the last column; pad on the left")
        suffix = torch.tensor(self.agreement, device=input_ids.device).expand(len(input_ids), -1)
        ids = torch.cat([input_ids, suffix], dim=1)
        mask = torch.cat([attention_mask, torch.ones_like(suffix)], dim=1)
        self._deciding = True
        try:
            ends = residuals(self.model, ids, mask, [-1 - len(self.agreement), -1])
        finally:
            self._deciding = False
        return _transitions(ends)[:, self.steering.first :]

    def _before_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._deciding:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("SCANS decides by a prompt's tokens; give input_ids instead of inputs_embeds")
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if not self._held and seen == 0:
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(ids)
            if mask.dim() != 2 or "packing" in kwargs:
                raise ValueError("SCANS treats rows one by one; give padded rows and a mask [B, S], no packed prompts")
            self.signs_B, self.start = self.signs(ids, mask), ids.shape[1] - 1
        assert self.signs_B is not None, "a pass behind a cache follows one that filled it"
        if len(ids) != len(self.signs_B):
            raise ValueError(
                f"a batch of {len(ids)} rows follows {len(self.signs_B)} prompts; tell the context which are left: "
                "applied.keep(rows)"
            )
        self._columns_S = torch.arange(seen, seen + ids.shape[1])

    def _steered(self, vector_D: Tensor, hidden_BSD: Tensor) -> Tensor:
        if self._deciding:
            return hidden_BSD
        assert self.signs_B is not None and self._columns_S is not None
        amount_BS = self.signs_B[:, None] * (self._columns_S >= self.start).to(self.signs_B)
        added_BSD = self.steering.alpha * amount_BS[..., None] * vector_D.to(amount_BS.device)
        return (hidden_BSD.float() + added_BSD.to(hidden_BSD.device)).to(hidden_BSD.dtype)


def fit(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    prompts: Prompts,
    *,
    alpha: float | None = None,
    threshold: float | None = None,
    kl_limit: float = 0.2,
) -> Fitted:
    """Find the steering vectors of a model, in one process; choose α and the threshold where they are not given.

    Vectors and references come from the first 64 toxic and harmless training prompts. The threshold is the one that
    tells toxic validation prompts from all others best, by balanced accuracy. α is the one with the largest difference
    between the refusal probabilities of toxic and seemingly toxic validation prompts, among those that change the next
    token of harmless ones by a mean KL of at most ``kl_limit`` nats. No other prompts take part in either choice.

    Args:
        model: in evaluation mode, whole, with an attention that takes padded rows.
        alpha, threshold: 3.5 and .75 are the paper's.

    Raises UserError where no α keeps within the limit. A given one is taken as it is.
    """
    encoded = encode(prompts, encoder)
    agreement = encoder.encode_opening(AGREEMENT)
    steering, distance = _anchored(model, encoded, agreement)
    validation = {name: side.validation[:VALIDATION] for name, side in encoded.items()}
    sigma = {
        name: steering.similarities(_transitions_of(model, kept, agreement)[:, steering.first :]).cpu()
        for name, kept in validation.items()
    }
    others = torch.cat([sigma["seemingly_toxic"], sigma["harmless"]])
    chosen_threshold = best_threshold(sigma["toxic"], others) if threshold is None else threshold
    steering = replace(steering, threshold=chosen_threshold)
    tree = OpeningTree.of_refusals(encoder)
    unsteered = next_token_logits(model, validation["harmless"])
    alphas = sorted({PAPER_ALPHA, *(multiple * distance for multiple in _MULTIPLES)}) if alpha is None else [alpha]
    tried: list[dict[str, Any]] = []
    for candidate in alphas:
        one = replace(steering, alpha=candidate)
        with one.applied(model, encoder.tokenizer) as applied:
            assert isinstance(applied, ScansApplied)
            moved = kl(unsteered, next_token_logits(model, validation["harmless"]))
            tried.append({"alpha": candidate, "kl": moved})
            # A stronger one moves them further.
            if alpha is None and moved > kl_limit:
                break
            tried[-1]["refusal"] = {
                name: mean(_steered_refusals(applied, kept, sigma[name], tree)) for name, kept in validation.items()
            }
        log.info("%s", tried[-1])
    best = choose(tried, kl_limit) if alpha is None else 0
    steering = replace(steering, alpha=tried[best]["alpha"])
    facts = {
        "alpha": steering.alpha,
        "threshold": steering.threshold,
        "steered_layers": [steering.first, steering.first + len(steering.vectors) - 1],
        "distance_of_means": distance,
        "kl": tried[best]["kl"],
        "kl_limit": kl_limit,
        "anchors": {name: min(ANCHORS, len(encoded[name].train)) for name in ("toxic", "harmless")},
        "validation_prompts": {name: len(kept) for name, kept in validation.items()},
        "taken_for_toxic": {name: float((s >= steering.threshold).float().mean()) for name, s in sigma.items()},
        "similarity": {name: [round(float(q), 4) for q in s.quantile(_QUARTILES)] for name, s in sigma.items()},
        "refusal_before": {name: mean(refusals(model, kept, tree)) for name, kept in validation.items()},
        "refusal_after": tried[best]["refusal"],
    }
    return Fitted(steering, tried, facts)


def best_threshold(toxic_N: Tensor, others_N: Tensor) -> float:
    """The threshold of σ with the largest balanced accuracy, in the middle of the widest gap that gives it."""
    values = torch.cat([toxic_N, others_N]).double().sort().values
    middles = (values[1:] + values[:-1]) / 2
    reached = torch.stack([(toxic_N >= m).double().mean() + (others_N < m).double().mean() for m in middles])
    gaps = torch.where(reached >= reached.max() - 1e-9, values.diff(), -1.0)
    return float(middles[gaps.argmax()])


def choose(tried: Sequence[Mapping[str, Any]], kl_limit: float) -> int:
    """Index of the α that tells the classes apart best, within the limit. Raises UserError where there is none."""
    within = [i for i, candidate in enumerate(tried) if candidate["kl"] <= kl_limit]
    if not within:
        nearest = min(candidate["kl"] for candidate in tried)
        raise UserError(
            f"none of {len(tried)} strengths keeps within a KL of {kl_limit:g} on harmless prompts (the nearest: "
            f"{nearest:.3g}); raise --kl-limit, or give --alpha"
        )
    return max(within, key=lambda i: tried[i]["refusal"]["toxic"] - tried[i]["refusal"]["seemingly_toxic"])


def _anchored(
    model: PreTrainedModel, encoded: Mapping[Any, EncodedSet], agreement: Sequence[int]
) -> tuple[Scans, float]:
    """Vectors and references from the anchors, and the mean distance between the classes' means at steered layers."""
    layers = len(backbone(model)[1])
    first, behind = round(_FIRST * layers), max(round(_BEHIND * layers), round(_FIRST * layers) + 1)
    anchors = {name: encoded[name].train[:ANCHORS] for name in ("toxic", "harmless")}
    means = {
        name: torch.cat(list(residuals_of(model, kept, [-1])))[:, 0, 1:].double().mean(dim=0)
        for name, kept in anchors.items()
    }
    difference_ND = (means["toxic"] - means["harmless"])[first:behind]
    lengths_N = difference_ND.norm(dim=-1)
    references_LD = _transitions_of(model, anchors["toxic"], agreement).double().mean(dim=0)
    return (
        Scans(
            layers,
            vectors=(difference_ND / lengths_N[:, None]).float().cpu(),
            references=references_LD[first:].float().cpu(),
            first=first,
            alpha=PAPER_ALPHA,
            threshold=PAPER_THRESHOLD,
        ),
        float(lengths_N.mean()),
    )


def _transitions_of(model: PreTrainedModel, encoded: Sequence[list[int]], agreement: Sequence[int]) -> Tensor:
    """t_l of each prompt at all layers, float32 [N, L, D]."""
    agreed = [[*ids, *agreement] for ids in encoded]
    return torch.cat([_transitions(ends) for ends in residuals_of(model, agreed, [-1 - len(agreement), -1])])


def _transitions(ends_B2LD: Tensor) -> Tensor:
    """t at every layer's output, [B, L, D], from the residual stream at depths 0 to L at the two tokens."""
    return ends_B2LD[:, 0, 1:] - ends_B2LD[:, 1, 1:]


def _steered_refusals(
    applied: ScansApplied, encoded: Sequence[list[int]], sigma_N: Tensor, tree: OpeningTree
) -> list[float]:
    """Refusal probability of each prompt under its own sign: one prompt a pass, since a pack's share tokens."""
    found: list[float] = []
    for ids, sigma in zip(encoded, sigma_N, strict=True):
        toxic = sigma >= applied.steering.threshold
        with applied.fixed(toxic.float()[None] * 2 - 1, len(ids) - 1):
            found += refusals(applied.model, [ids], tree)
    return found


_QUARTILES = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
