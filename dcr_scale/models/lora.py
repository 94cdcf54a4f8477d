"""Low-rank updates: what peft adapts, and what it has trained, merged into weights element range by element range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dcr_scale.config import LoraConfig
from dcr_scale.errors import UserError

if TYPE_CHECKING:
    import peft

# Elements of the update computed at once.
_BLOCK = 2**20


@dataclass(frozen=True)
class LowRankDelta:
    """``scaling * up @ down`` for a weight [out, in], or one such update for each of E experts' weights.

    ``up`` is [E, out, r] and ``down`` [E, r, in], with E = 1 for a plain weight; any floating dtype, on
    the CPU.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def elements(self, start: int, count: int) -> torch.Tensor:
        """Elements [start, start + count) of the flattened update, float32 [count].

        Rows are multiplied in blocks whose borders are the same whatever is asked for, so that ranks that
        cut a weight in different places compute the same bits; and in float64, since in float32 a product's
        last bits are a matter of how many threads a rank has.
        """
        rows, width = self.up.shape[1], self.down.shape[2]
        block = max(1, _BLOCK // width)
        out = torch.empty(count, dtype=torch.float32)
        done = 0
        while done < count:
            expert, row = divmod((start + done) // width, rows)
            first_row = row // block * block
            up = self.up[expert, first_row : first_row + block].double() * self.scaling
            product = (up @ self.down[expert].double()).float().flatten()
            skipped = start + done - (expert * rows + first_row) * width
            part = product[skipped:][: count - done]
            out[done : done + part.numel()] = part
            done += part.numel()
        return out


def adapter_config(settings: LoraConfig, model: PreTrainedModel) -> peft.LoraConfig:
    """Stage 2's adapters in peft's form: on every linear layer but the head, where the settings name none."""
    import peft

    head = model.get_output_embeddings()
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or linears,
    )


def plain_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Name, module and adapter's name of each layer that peft has wrapped.

    Raises UserError for adapters that are no plain low-rank update.
    """
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, layer in layers:
        if len(layer.active_adapters) != 1:
            raise UserError(f"{name}: has the adapters {layer.active_adapters}; one can be exported")
        adapter = layer.active_adapters[0]
        if adapter not in layer.lora_A or adapter in layer.lora_variant or layer.lora_bias[adapter]:
            raise UserError(
                f"{name}: only plain LoRA on linear layers can be exported; leave out embeddings, DoRA and LoRA biases"
            )
        yield name, layer, adapter


@torch.no_grad()
def lora_deltas(
    model: nn.Module,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager] = nullcontext,
) -> dict[nn.Parameter, LowRankDelta]:
    """The updates of a peft model's active adapter, by the base weight each belongs to.

    Linear layers, and 3-D parameters of fused experts. ``gather`` makes partitioned parameters whole inside
    its context (``GatheredParameters``); every rank calls this. Factors keep their dtype: together they are
    about r / width of the model. Raises UserError for adapters that are no plain low-rank update.
    """
    deltas = {}
    for _, layer, adapter in plain_layers(model):
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        with gather([A, B]):
            A, B = A.detach().cpu().clone(), B.detach().cpu().clone()
        # peft's wrapper of bare parameters stacks the experts' factors: A's rows are [E, r], B's columns
        # [r, E].
        experts = getattr(layer, "num_experts", 1)
        down = A.view(experts, -1, A.shape[-1])
        up = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        base = layer.get_base_layer()
        if layer.fan_in_fan_out or (experts > 1 and getattr(base, "is_transposed", False)):
            # The weight is stored as [in, out].
            up, down = down.transpose(1, 2), up.transpose(1, 2)
        weight = getattr(base, getattr(layer, "parameter_name", "weight"))
        deltas[weight] = LowRankDelta(up, down, layer.scaling[adapter])
    return deltas
