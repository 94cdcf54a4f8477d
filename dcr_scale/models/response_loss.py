"""Stage 2's loss: the summed cross-entropy of a pack's response tokens, without all of their logits at once.

At a vocabulary of 128k the logits are the largest tensors of the step. They are made for response tokens alone and for
a few rows at a time: forward and gradient of a row need no other row. (torch's ``linear_cross_entropy`` does the same
since 2.13, and gives the loss in the inputs' dtype: in bfloat16, three digits of it.)

Shape suffixes: N response tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcr_scale.data.packing import Pack

# Logits made at once: 128 MiB in float32, enough rows for a product at the device's full rate.
_AT_ONCE = 2**25


class ResponseLoss(nn.Module):
    """A causal language model that returns the summed cross-entropy of a pack's response tokens.

    Logits come a few rows at a time where nothing follows the head. A model may scale or cap them behind its head:
    whether this one does is seen when it is first asked for logits, and until then they come at once.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self._head_is_last = False

    def forward(self, batch: Pack, at: Tensor | None = None) -> Tensor:
        """Σ of −log p over the pack's labels that are not −100, a float32 scalar; with positions ``at`` (int64 [n])
        the logits [n, V] there instead."""
        if at is not None:
            return self._logits(batch, at)
        assert batch.labels is not None
        at = batch.labels.ne(-100).nonzero()[:, 0]
        return self.summed(batch, at, batch.labels[at])

    def summed(self, batch: Pack, at: Tensor, targets_N: Tensor) -> Tensor:
        """The same for given positions int64 [N] and the tokens that follow there."""
        head = self.model.get_output_embeddings()
        # Fewer rows than are made at once gain nothing.
        if not self._head_is_last or len(at) <= _rows_at_once(head):
            return F.cross_entropy(self._call(batch, at).float(), targets_N, reduction="sum")
        with _summing(head, targets_N):
            return self._call(batch, at)

    def _logits(self, batch: Pack, at: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()
        made: list[tuple[Tensor, int]] = []
        handle = head.register_forward_hook(lambda module, inputs, output: made.append((output, output._version)))
        logits = self._call(batch, at, whole=True)
        handle.remove()
        ((output, version),) = made
        # ZeRO-3's hooks hand on other tensors over the same memory.
        same = all(
            get(logits) == get(output) for get in (storage_of, Tensor.storage_offset, Tensor.size, Tensor.stride)
        )
        unchanged = same and logits.dtype == output.dtype and logits._version == version
        self._head_is_last = type(head) is nn.Linear and unchanged
        return logits[0]

    def _call(self, batch: Pack, at: Tensor, *, whole: bool = False) -> Tensor:
        """What the model calls logits: [1, n, V], of which the only row, unless it is wanted ``whole``."""
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=None,
            use_cache=False,
            packing=batch.layout,
            logits_to_keep=at,
        )
        return output.logits if whole else output.logits[0]


def storage_of(tensor: Tensor) -> int:
    """A number of the memory that the tensor views, its own as long as that is held; fake tensors have one too."""
    return tensor.untyped_storage()._cdata


def _rows_at_once(head: nn.Linear) -> int:
    rows = max(1, _AT_ONCE // head.out_features)
    # Not head.weight: asked for outside the head's own forward pass, ZeRO-3 would keep it gathered through the model's.
    trains = dict(head.named_parameters(recurse=False))["weight"].requires_grad
    # Every part adds to a gradient of the weight's size. So many rows, and their products take longer than that.
    return max(rows, head.in_features // 4) if trains else rows


@contextmanager
def _summing(head: nn.Linear, targets_N: Tensor) -> Iterator[None]:
    """Inside the context the head gives [1] summed losses for hidden states [1, N, D], as a module under ZeRO-3 does:
    its weight is there while it runs."""

    def forward(hidden_1ND: Tensor) -> Tensor:
        hidden_ND = hidden_1ND[0]
        return cast(Tensor, HeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N, _rows_at_once(head)))[None]

    before = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[assignment, method-assign]


class HeadLoss(torch.autograd.Function):
    """Σ over rows of logsumexp(z) − z[target], z = W h + b: with e = softmax(z) − onehot, ∂/∂h = Wᵀ e, ∂/∂W = Σ e hᵀ.

    Gradients are made on the way, as long as a row's logits are there, so that none is kept and backward needs no W.
    W's is made only where it trains, and serves one backward pass. Products are in the inputs' dtype, sums in float32
    at least, as in ``F.cross_entropy(linear(h).float())``; the parts of W's gradient are added up in W's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, rows: int
    ) -> Tensor:
        """A scalar, float32 (float64 for float64). ``rows``: how many rows' logits are held at once."""
        total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        gradient_ND = torch.empty_like(hidden_ND)
        _, weight_trains, bias_trains, *_ = ctx.needs_input_grad
        gradient_VD = torch.zeros_like(weight_VD) if weight_trains else None
        gradient_V = total.new_zeros(len(weight_VD)) if bias_trains else None
        for own_ND, targets, own_gradient in zip(
            hidden_ND.split(rows), targets_N.split(rows), gradient_ND.split(rows), strict=True
        ):
            logits_NV = F.linear(own_ND, weight_VD, bias_V).to(total.dtype)
            column = targets[:, None]
            normaliser = logits_NV.logsumexp(-1, keepdim=True)
            total += (normaliser - logits_NV.gather(1, column)).sum()
            excess_NV = logits_NV.sub_(normaliser).exp_()
            excess_NV.scatter_add_(1, column, excess_NV.new_full(column.shape, -1.0))
            if gradient_V is not None:
                gradient_V += excess_NV.sum(dim=0)
            rounded_NV = excess_NV.to(weight_VD.dtype)
            torch.mm(rounded_NV, weight_VD, out=own_gradient)
            if gradient_VD is not None:
                gradient_VD.addmm_(rounded_NV.mT, own_ND)
            del logits_NV, excess_NV, rounded_NV  # before the next rows' are made
        ctx.save_for_backward(gradient_ND)
        ctx.gradients = gradient_VD, None if gradient_V is None else gradient_V.to(weight_VD.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        # In place, not to hold the largest one twice.
        own = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.gradients]
        del ctx.gradients
        return gradient_ND * upstream.to(gradient_ND.dtype), *own, None, None
