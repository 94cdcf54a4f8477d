"""An experts module's forward pass with its products laid open: one expert after another, rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcr_scale.probe.layout import Routing

# Of one matrix: itself [experts, …], its inputs and outputs [M, …], and which expert each row met.
Watch = Callable[[Tensor, Tensor, Tensor, Routing], None]


def run_experts(module: Any, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, watch: Watch) -> Tensor:
    """What transformers' experts interface asks for, [T, D]; ``watch`` is shown every product before it is used."""
    routing = Routing.of(index_TK, module.num_experts)

    def apply(key: str, x_MD: Tensor) -> Tensor:
        weight, bias = getattr(module, key), getattr(module, f"{key}_bias", None)
        pieces = []
        for expert, start, stop in routing.spans:
            matrix = weight[expert].T if module.is_transposed else weight[expert]
            pieces.append(F.linear(x_MD[start:stop], matrix, None if bias is None else bias[expert]))
        output_MD = torch.cat(pieces)
        watch(weight, x_MD, output_MD, routing)
        return output_MD

    inner = apply("gate_up_proj" if module.has_gate else "up_proj", hidden_TD[routing.tokens])
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = apply("down_proj", inner) * weights_TK.reshape(-1)[routing.order, None]
    return outer[routing.inverse].view(*index_TK.shape, -1).sum(dim=1).to(hidden_TD.dtype)
