r"""Where stage 1 should end: the rule behind ``refine.layer: auto``.

Stage 1 trains the layers below ℓ so that the classes' activations at ℓ lie apart, and leaves the layers from ℓ on as
they are. Two things must hold for that to lower the kernel of a seemingly toxic prompt and its toxic twin:

* **The kernel must lie above ℓ.** By Proposition 1 the activations at ℓ bound the part of ‖K‖_F that the layers from ℓ
  on contribute; what the layers below contribute stays in its remainder. With ⟨K_l, K⟩_F the contribution of layer l,
  summed over matched pairs, *above*(ℓ) = Σ_{l ≥ ℓ} ⟨K_l, K⟩_F / Σ_l ⟨K_l, K⟩_F. It falls from 1 as ℓ grows.
* **The classes must be separable at ℓ** in a way that holds for subjects not trained on. For every family of matched
  pairs a direction is learnt from all other families' differences z(toxic) − z(seemingly toxic), by ridge regression;
  *apart*(ℓ) is the share of matched pairs in which the toxic side lies further along it. It is 0.5 at random, and
  grows with ℓ. Where prompts come from or what they are about cannot help: both sides of a pair share it.

The score is the share of the kernel that a separation learnt at ℓ would reach, *above*(ℓ) · (2 *apart*(ℓ) − 1). Chosen
is the smallest ℓ whose score is within one standard error of the largest, as a smaller trunk costs less; the error is
that of the difference, by the jackknife over families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcr_scale.config import ProbeConfig
from dcr_scale.data.contrast import EncodedPrompts
from dcr_scale.models.trunk import decoder_layers
from dcr_scale.probe.activations import rows_at_depths
from dcr_scale.probe.measure import KernelProbe
from dcr_scale.world import World

# Of the ridge regression, as a share of the mean squared length of the differences.
_RIDGE = 0.1


@dataclass(frozen=True)
class Depth:
    """What was found where layer ℓ reads; shares in 0 … 1, ``cosine`` the mean of matched pairs.

    ``kernel``: the share of layer ℓ alone in the decoder layers' kernel; ``above``: of it and all layers after it.
    ``behind``: how far the score lies under the largest, and ``stderr`` the standard error of that.
    """

    layer: int
    kernel: float
    above: float
    apart: float
    cosine: float
    score: float
    behind: float
    stderr: float


@dataclass(frozen=True)
class LayerChoice:
    """The chosen ℓ, why, and what it was chosen from: one :class:`Depth` for each ℓ from 1 to L − 1."""

    layer: int
    reason: str
    depths: tuple[Depth, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{name: round(value, 5) for name, value in asdict(depth).items()} for depth in self.depths]
        return {"layer": self.layer, "reason": self.reason, "depths": rows}

    def table(self) -> str:
        """One line for each ℓ, the chosen one marked."""
        lines = ["   ℓ  kernel in ℓ  from ℓ on  pairs told apart  their cosine  score  behind the best"]
        for depth in self.depths:
            mark = "→" if depth.layer == self.layer else " "
            lines.append(
                f"{mark}{depth.layer:>3}  {depth.kernel:>11.1%}  {depth.above:>9.1%}  {depth.apart:>16.1%}  "
                f"{depth.cosine:>12.4f}  {depth.score:>5.3f}  {depth.behind:.3f} ± {depth.stderr:.3f}"
            )
        return "\n".join(lines)


def matched_pairs(contrast: EncodedPrompts) -> list[tuple[int, int]]:
    """(seemingly toxic, toxic) rows of the matched pairs, in the prompts' order."""
    sides: dict[str, dict[str, int]] = {}
    for i, prompt in enumerate(contrast.prompts):
        if prompt.pair is not None:
            sides.setdefault(prompt.pair, {})[prompt.label] = i
    return [(pair["seemingly_toxic"], pair["toxic"]) for pair in sides.values() if len(pair) == 2]


def choose_layer(
    model: nn.Module, contrast: EncodedPrompts, settings: ProbeConfig, *, prefix: int, pooling: str, world: World
) -> LayerChoice:
    """Measure a causal language model on matched held-out pairs, and choose.

    All pairs are used to judge how separable the classes are (one forward pass gives every ℓ), the first
    ``settings.pairs`` of them for the kernel. Every rank calls it and gets the same choice.

    Args:
        contrast: held-out prompts; ``prefix`` leading tokens are the same in all of them.
        pooling: how stage 1 will pool a prompt's activations.

    Raises ValueError, on all ranks alike: for pairs of fewer than two families, for whatever the probe refuses, and
    where nothing is found to choose by.
    """
    pairs = matched_pairs(contrast)
    families = [contrast.prompts[toxic].family for _, toxic in pairs]
    probed = pairs[: settings.pairs]
    for what, number in (("held-out", len(pairs)), ("probe.pairs", len(probed))):
        if len(set(families[:number])) < 2:
            raise ValueError(f"the {number} {what} matched pairs are not of two families at least")
    encoded = [contrast.ids[i] for pair in pairs for i in pair]
    rows_NLD = rows_at_depths(
        model,
        encoded,
        range(1, len(decoder_layers(model))),
        prefix=prefix,
        pooling=pooling,
        normalize=True,
        token_limit=settings.micro_batch_tokens,
        world=world,
    )
    probe = KernelProbe.configured(model, settings)
    found = probe.measure([contrast.ids[left] for left, _ in probed], [contrast.ids[right] for _, right in probed])
    return choose(rows_NLD.cpu().unflatten(0, (-1, 2)), found.by_layer.diagonal(dim1=1, dim2=2), families)


def choose(rows_PSLD: Tensor, by_layer_LK: Tensor, families: Sequence[str]) -> LayerChoice:
    """The rule itself.

    Args:
        rows_PSLD: unit rows of P matched pairs, seemingly toxic and toxic, at depths 1 to L − 1.
        by_layer_LK: ⟨K_l, K⟩_F of each decoder layer for the first K of the pairs.
        families: of each pair.

    Raises ValueError where the kernel's estimate is drowned in noise, or no depth tells pairs apart.
    """
    rows_PSLD, by_layer_LK = rows_PSLD.double(), by_layer_LK.double()
    names = sorted(set(families))
    family_P = torch.tensor([names.index(family) for family in families])
    ordered_PL = told_apart(rows_PSLD[:, 1] - rows_PSLD[:, 0], family_P)

    def scores(kept_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel_L = by_layer_LK[:, kept_P[: by_layer_LK.shape[1]]].sum(dim=1)
        share_L = kernel_L / kernel_L.sum()
        above_l, apart_l = share_L.flip(0).cumsum(0).flip(0)[1:], ordered_PL[kept_P].mean(dim=0)
        return share_L[1:], above_l, apart_l

    everything = torch.ones_like(family_P, dtype=torch.bool)
    if by_layer_LK.sum() <= 0:
        raise ValueError(
            "the estimated kernel of the matched pairs is not positive, so noise is all there is; raise "
            "probe.output_probes or probe.pairs"
        )
    share_l, above_l, apart_l = scores(everything)
    score_l = _score(above_l, apart_l)
    best = int(score_l.argmax())
    if score_l[best] <= 0:
        raise ValueError(f"no layer tells the sides of the {len(families)} matched pairs apart")
    without = [_score(*scores(family_P != family)[1:]) for family in range(len(names))]
    behind_Fl = torch.stack([score[best] - score for score in without])
    stderr_l = ((len(names) - 1) * behind_Fl.var(dim=0, correction=0)).sqrt()
    behind_l = score_l[best] - score_l
    chosen = int((behind_l <= stderr_l).nonzero()[0])
    cosine_l = (rows_PSLD[:, 0] * rows_PSLD[:, 1]).sum(dim=-1).mean(dim=0)
    columns = torch.stack([share_l, above_l, apart_l, cosine_l, score_l, behind_l, stderr_l], dim=1).tolist()
    depths = tuple(Depth(layer, *values) for layer, values in enumerate(columns, start=1))
    return LayerChoice(chosen + 1, _reason(depths[chosen], depths[best]), depths)


def told_apart(differences_PLD: Tensor, family_P: Tensor) -> Tensor:
    """For each pair and depth 1.0 where the other families' direction orders its sides rightly, else 0.0: [P, L].

    The direction w of a depth minimises Σ (w·d − 1)² + λ‖w‖² over the other families' differences d; it is computed in
    their span, where the problem is as large as there are pairs.
    """
    gram_LPP = torch.einsum("pld,qld->lpq", differences_PLD, differences_PLD)
    ordered_PL = gram_LPP.new_zeros(len(family_P), len(gram_LPP))
    for family in family_P.unique():
        own, others = family_P == family, family_P != family
        inner_Lpp = gram_LPP[:, others][:, :, others]
        ridge_L11 = _RIDGE * inner_Lpp.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        # A depth at which no two sides differ has no direction: its pairs stay unordered.
        ridge_L11 = ridge_L11.clamp_min(torch.finfo(ridge_L11.dtype).tiny)
        eye_pp = torch.eye(inner_Lpp.shape[1], dtype=inner_Lpp.dtype)
        weights_Lp = torch.linalg.solve(inner_Lpp + ridge_L11 * eye_pp, inner_Lpp.new_ones(inner_Lpp.shape[:2]))
        margin_Lq = (gram_LPP[:, own][:, :, others] @ weights_Lp[..., None])[..., 0]
        ordered_PL[own] = (margin_Lq > 0).double().T
    return ordered_PL


def _score(above_l: Tensor, apart_l: Tensor) -> Tensor:
    return above_l * (2 * apart_l - 1).clamp_min(0)


def _reason(chosen: Depth, best: Depth) -> str:
    found = (
        f"ℓ = {chosen.layer}: layers from there on hold {chosen.above:.0%} of the kernel of matched pairs, and "
        f"{chosen.apart:.0%} of the pairs are told apart there"
    )
    if chosen is best:
        return f"{found}: the largest score, {chosen.score:.3f}, and no smaller ℓ comes within its error"
    return (
        f"{found}: the smallest ℓ whose score ({chosen.score:.3f}) is within one standard error of the largest "
        f"({best.score:.3f} at ℓ = {best.layer})"
    )
