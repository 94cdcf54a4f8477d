"""Proposition 1, measured: do prompts whose activations at ℓ are alike have a large kernel?

For held-out prompts, the Spearman correlation over pairs between the similarity of their activations at ℓ and
‖K(x', x)‖_F. The similarity is the cosine of the pooled rows, which stage 1 lowers, or h'ᵀQh with Q the tail's part
(:mod:`dcr_scale.probe.tail_form`), by which the proposition bounds the kernel. Q comes from reference prompts that are
in none of the pairs.

Intervals are bootstrapped over prompts, within each class: pairs share prompts, so they are no sample of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from dcr_scale.config import ProbeConfig
from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.probe.activations import rows_at_depths
from dcr_scale.probe.estimator import signed_root
from dcr_scale.probe.measure import KernelProbe
from dcr_scale.probe.tail_form import estimate_tail_form
from dcr_scale.world import World

_LEVEL = 0.95


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Over ``pairs`` pairs: the correlations with ‖K‖_F, the mean cosine, and what became of the kernel.

    ``similarity``: the root of mean ‖K(x', x)‖² over the prompts' mean ‖K(x, x)‖². ``above``: the share of the decoder
    layers' contributions to the former that layers from ℓ on make; the proposition bounds it, and not the rest.
    """

    pairs: int
    cosine: Correlation
    tail_form: Correlation
    mean_cosine: float
    similarity: float
    above: float


@dataclass(frozen=True)
class Proposition:
    """One model's result at ℓ: over all pairs of different prompts, and over those of the two classes alone."""

    layer: int
    prompts: int
    all: Agreement
    cross: Agreement

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_proposition(
    model: nn.Module,
    prompts: EncodedPrompts,
    reference: Sequence[Sequence[int]],
    layer: int,
    settings: ProbeConfig,
    *,
    prefix: int,
    pooling: str,
    world: World,
) -> Proposition:
    """Measure a causal language model. Every rank calls it and gets the same result.

    Args:
        prompts: held-out prompts of both classes, two of each at least, ``prefix`` leading tokens the same in all.
        reference: token ids of other prompts, at least two, from which Q is estimated.
        pooling: how stage 1 pools a prompt's activations.

    Raises ValueError, on all ranks alike, for whatever the probe refuses.
    """
    rows_ND = rows_at_depths(
        model,
        prompts.ids,
        [layer],
        prefix=prefix,
        pooling=pooling,
        normalize=False,
        token_limit=settings.micro_batch_tokens,
        world=world,
    )[:, 0].double()
    form = estimate_tail_form(
        model,
        reference,
        layer,
        prefix=prefix,
        pooling=pooling,
        probes=settings.output_probes,
        seed=settings.seed,
        token_limit=settings.micro_batch_tokens,
    )
    probe = KernelProbe.configured(model, settings)
    found = probe.measure(prompts.ids)
    rows_ND = rows_ND.cpu()
    unit_ND = torch.nn.functional.normalize(rows_ND, dim=1)
    toxic_N = torch.tensor([prompt.label == "toxic" for prompt in prompts.prompts])
    cosine_NN, form_NN = unit_ND @ unit_ND.T, form.similarity(rows_ND, rows_ND)
    different = torch.ones_like(cosine_NN, dtype=torch.bool).triu(1)
    across = different & (toxic_N[:, None] != toxic_N[None, :])

    def agreement(pairs_NN: Tensor) -> Agreement:
        return Agreement(
            int(pairs_NN.sum()),
            rank_correlation(cosine_NN, found.frobenius, pairs_NN, toxic_N, seed=settings.seed),
            rank_correlation(form_NN, found.frobenius, pairs_NN, toxic_N, seed=settings.seed),
            float(cosine_NN[pairs_NN].mean()),
            float(signed_root(found.squared[pairs_NN].mean() / found.self_squared.mean().clamp_min(0))),
            float(found.by_layer[layer:, pairs_NN].sum() / found.by_layer[:, pairs_NN].sum()),
        )

    return Proposition(layer, len(toxic_N), agreement(different), agreement(across))


def rank_correlation(
    similarity_NN: Tensor, kernel_NN: Tensor, pairs_NN: Tensor, classes_N: Tensor, *, seed: int, draws: int = 1000
) -> Correlation:
    """Spearman's ρ of two quantities over the pairs (i, j) that ``pairs_NN`` (bool, upper triangle) names.

    A bootstrap draw takes as many prompts of each class as there are, with replacement; a pair counts as often as its
    two prompts' numbers multiply to, and a prompt is never paired with itself. The interval is that of percentiles.
    """
    left, right = (side.numpy() for side in pairs_NN.nonzero(as_tuple=True))
    x, y = similarity_NN.numpy()[left, right], kernel_NN.numpy()[left, right]
    members = [(classes_N == label).nonzero()[:, 0].numpy() for label in classes_N.unique()]
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        times = np.bincount(np.concatenate([random.choice(own, len(own)) for own in members]), minlength=len(classes_N))
        chosen = np.repeat(np.arange(len(x)), times[left] * times[right])
        drawn.append(_spearman(x[chosen], y[chosen]))
    tail = (1 - _LEVEL) / 2
    # A draw of which all pairs are one and the same has no correlation.
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return Correlation(_spearman(x, y), float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    ranks = [stats.rankdata(values) for values in (x, y)]
    spread = [rank.std() if len(rank) else 0.0 for rank in ranks]
    if not all(spread):
        return float("nan")
    centred = [rank - rank.mean() for rank in ranks]
    return float((centred[0] * centred[1]).mean() / (spread[0] * spread[1]))
