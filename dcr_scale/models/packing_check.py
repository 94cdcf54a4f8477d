"""A check before training that prompts packed together do not see each other.

Such a leak raises no error and ruins a run silently; two forward passes of two prompts rule it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcr_scale.data.packing import Pack, pack
from dcr_scale.errors import UserError

# Far above what rounding can do in float32; in bf16, whose unit is 2⁻⁸, a dozen units. A leak moves activations by
# their own order.
_TOLERANCE = 0.05


def check_packing(
    activations: Callable[[Pack], Tensor], encoded: Sequence[Sequence[int]], prefix: int, device: torch.device
) -> None:
    """Compare the second of two prompts' activations [T, D] alone and behind the first.

    Raises UserError where they differ beyond rounding: the model mixes tokens somewhere other than in its attention.
    """
    first, second = encoded[0], encoded[1]
    together_TD = activations(pack([first, second], prefix=prefix, device=device))[-(len(second) - prefix) :]
    alone_TD = activations(pack([second], prefix=prefix, device=device))[prefix:]
    leak = found_leak(alone_TD, together_TD)
    if leak is not None:
        raise UserError(f"{leak} and cannot be trained here")


def found_leak(alone_TD: Tensor, together_TD: Tensor) -> str | None:
    """What is wrong where a prompt's activations [T, D] alone and behind another differ beyond rounding, else None."""
    difference = (together_TD.float() - alone_TD.float()).norm() / alone_TD.float().norm()
    if not difference > _TOLERANCE:
        return None
    return (
        f"prompts packed together see each other in this model (activations move by {float(difference):.0%} when "
        "another prompt is put in front): it mixes tokens outside softmax attention"
    )
