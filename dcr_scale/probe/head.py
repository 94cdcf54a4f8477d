"""The output head in closed form: probes of the logits, taken back to the final hidden state.

The head's own part of the kernel is (h'·h) I, known exactly; probing the final hidden state with Wᵀu leaves only the
body to be sketched. A head that is the embedding too has two more parts, where one prompt's use as head meets the
other's as embedding: u_rᵀ (·) u_s = Σ_t u_r[token t] h'·δ_t, with δ_t the gradient at the other prompt's token t.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dcr_scale.probe.philox import derive_key, normals
from dcr_scale.probe.units import Inventory, shape_of


def gathered(parameter: Any) -> AbstractContextManager:
    """Inside the context every rank sees the parameter whole, under ZeRO-3 too. All ranks must enter it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from dcr_scale import engine

    return engine.whole([parameter])


class Head:
    """R Gaussian probes of the logits, and what the head adds to the kernel.

    Attributes:
        vocabulary: V, rows of the head.
        crosses: whether the head is the embedding and counts, so that its two uses meet.
        failure: what is wrong with the head's own numbers, or None.
    """

    def __init__(self, inventory: Inventory, seed: int, probes: int):
        module = inventory.head
        self.weight, self.probes = module.weight, probes
        self.vocabulary, self.width = shape_of(module.weight)
        self.device, self.dtype = module.weight.device, module.weight.dtype
        self.counts, self.bias_counts = inventory.head_counts, inventory.head_bias_counts
        self.crosses = inventory.tied and inventory.head_counts
        drawn = [normals(derive_key(seed, "output", probe), self.vocabulary, self.device) for probe in range(probes)]
        self._probes_RV = torch.stack(drawn).float()
        bias = getattr(module, "bias", None)
        with torch.no_grad(), gathered(module.weight):
            self._back_RD = self._probes_RV @ module.weight.float()
        self._shift_R = torch.zeros(probes, device=self.device)
        if bias is not None:
            with torch.no_grad(), gathered(bias):
                self._shift_R = self._probes_RV @ bias.float()
        finite = self._back_RD.isfinite().all() and self._shift_R.isfinite().all()
        self.failure = None if finite else "the output head: its weights are not finite"

    def cotangents(self, probes: Tensor) -> Tensor:
        """Wᵀu for each of ``probes`` (int64 [B]): float32 [B, D]."""
        return self._back_RD[probes]

    def at_tokens(self, ids_T: Tensor) -> Tensor:
        """Every probe's entry at each token: float32 [T, R]."""
        return self._probes_RV.T[ids_T]

    def own_part(self, left_ID: Tensor, right_JD: Tensor, paired: bool) -> Tensor:
        """c, float64 [I, J] from final hidden states; [I, 1] for the pairs (left[i], right[i])."""
        if paired:
            c = (left_ID.double() * right_JD.double()).sum(dim=1, keepdim=True)
        else:
            c = left_ID.double() @ right_JD.double().T
        return c * float(self.counts) + float(self.bias_counts)

    @staticmethod
    def cross_part(left_ID: Tensor, left_meets: Tensor, right_JD: Tensor, right_meets: Tensor, paired: bool) -> Tensor:
        """What a tied head adds to u_rᵀ K u_s: float64 [I, J, R, R], or [I, 1, R, R] for pairs.

        ``left_meets`` and ``right_meets``: [I, S, R, D] and [J, S, R, D], Σ_t u_r[token t] δ_t under the cotangent s.
        """
        if paired:
            ahead = torch.einsum("id,isrd->irs", left_ID, right_meets)
            return (ahead + torch.einsum("id,irsd->irs", right_JD, left_meets))[:, None]
        ahead = torch.einsum("id,jsrd->ijrs", left_ID, right_meets)
        return ahead + torch.einsum("jd,irsd->ijrs", right_JD, left_meets)

    def why_not_linear(self, hidden_D: Tensor, logits_V: Tensor) -> str | None:
        """What is wrong where the logits are not W h + b, as with soft-capped or scaled ones; None where they are."""
        given = self._probes_RV @ logits_V.float()
        expected = self._back_RD @ hidden_D.float() + self._shift_R
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        if (given - expected).abs().max() <= tolerance * (logits_V.float().norm() + expected.norm()):
            return None
        return "the model's logits are not its head's product with the final hidden state (they are capped or scaled)"
