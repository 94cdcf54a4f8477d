"""A check before training that prompts packed together do not see each other.

Such a leak raises no error and ruins a run silently; two forward passes of two prompts rule it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from dcr_scale.data.packing import Pack, pack
from dcr_scale.errors import UserError
from dcr_scale.world import World

# Far above what rounding can do in float32; in bf16, whose unit is 2⁻⁸, a dozen units. A leak moves activations by
# their own order.
_TOLERANCE = 0.05


def check_packing(
    activations: Callable[[Pack], Tensor],
    encoded: Sequence[Sequence[int]],
    prefix: int,
    device: torch.device,
    world: World | None = None,
) -> None:
    """Compare the second of two prompts' activations [T, D] alone and behind the first.

    Raises UserError, with a ``world`` on all of its ranks, where they differ beyond rounding: the model mixes tokens
    somewhere other than in its attention; and where they are not finite, which says nothing of that.
    """
    first, second = encoded[0], encoded[1]
    together_TD = activations(pack([first, second], prefix=prefix, device=device))[-(len(second) - prefix) :]
    alone_TD = activations(pack([second], prefix=prefix, device=device))[prefix:]
    finite = math.isfinite(_moved(alone_TD, together_TD))
    leak = found_leak(alone_TD, together_TD)
    # What ranks compute may differ, by a last bit or by a broken GPU.
    with world.agreed() if world is not None else nullcontext():
        if not finite:
            raise UserError(
                "the model's activations are not finite, before anything has trained: its weights are damaged, or a "
                "device computes them wrongly; get the checkpoint anew, or try engine.precision=fp32"
            )
        if leak is not None:
            raise UserError(f"{leak} and cannot be trained here")


def found_leak(alone_TD: Tensor, together_TD: Tensor) -> str | None:
    """What is wrong where a prompt's activations [T, D] alone and behind another differ beyond rounding, in words.

    None where they do not, and where they are not finite, which says nothing of it.
    """
    moved = _moved(alone_TD, together_TD)
    if not moved > _TOLERANCE or not math.isfinite(moved):
        return None
    return (
        f"prompts packed together see each other in this model (activations move by {moved:.0%} when another prompt is "
        "put in front): it mixes tokens outside softmax attention"
    )


def _moved(alone_TD: Tensor, together_TD: Tensor) -> float:
    """How far activations [T, D] lie from each other, by their norm."""
    # Some heads switch tokens off by the least number there is.
    off_TD = alone_TD <= torch.finfo(alone_TD.dtype).min
    together_TD, alone_TD = (x.float().masked_fill(off_TD, 0.0) for x in (together_TD, alone_TD))
    return float((together_TD - alone_TD).norm() / alone_TD.norm())
