"""What a trunk of each depth would give for a prompt, from one forward pass of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dcr_kernels import pool
from dcr_scale.data.packing import Pack, pack
from dcr_scale.models.packing_check import found_leak
from dcr_scale.models.trunk import decoder_layers
from dcr_scale.probe.agreement import agree
from dcr_scale.probe.guard import borrowed, unnoticed
from dcr_scale.separation import gathered_rows
from dcr_scale.world import World

# What a convolution or a recurrence carries into the next prompt shows in its first tokens.
_COMPARED = 8


def final_hidden(model: PreTrainedModel, batch: Pack) -> Tensor:
    """A causal language model's final hidden states [T, D] of a pack's tokens."""
    return model.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        attention_mask=None,
        use_cache=False,
        packing=batch.layout,
    ).last_hidden_state[0]


@torch.no_grad()
def leak_between(model: PreTrainedModel, encoded: Sequence[Sequence[int]]) -> str | None:
    """What one prompt sees of another packed in front of it, in words, as this rank finds it; None where nothing.

    One forward pass of a few tokens: at the pack's beginning, a causal model's prompt is alone. Every rank of a
    partitioned model calls it with the same prompts, within :func:`~dcr_scale.probe.guard.borrowed`.
    """
    first, second = encoded[0][-_COMPARED:], encoded[-1][:_COMPARED]
    hidden_TD = final_hidden(model, pack([second, first, second], device=next(model.parameters()).device))
    return found_leak(hidden_TD[: len(second)], hidden_TD[-len(second) :])


@torch.no_grad()
def rows_at_depths(
    model: PreTrainedModel,
    encoded: Sequence[Sequence[int]],
    depths: Sequence[int],
    *,
    prefix: int,
    pooling: str,
    normalize: bool,
    token_limit: int,
    world: World,
) -> Tensor:
    """Pooled rows of N prompts at several depths: float32 [N, depths, D], on every rank.

    The row at depth ℓ is what a trunk of ℓ layers gives, the residual stream that layer ℓ reads.

    Args:
        model: the causal language model; every rank calls it equally often.
        encoded: token ids, the same on all ranks; ``prefix`` leading tokens are the same in all prompts.
        depths: ascending, each from 0 to L − 1.
        pooling, normalize: as :func:`dcr_kernels.pool` takes them.
        token_limit: tokens of one pack.

    Raises ValueError, on all ranks alike, for a model in which packed prompts see each other.
    """
    layers = decoder_layers(model)
    rows: list[Tensor] = []

    def run(batch: Pack) -> Tensor:
        rows.clear()

        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden_TD = (args[0] if args else kwargs["hidden_states"])[0]
            own_TD, cu_seqlens = hidden_TD[batch.layout.prefix :], batch.layout.cu_seqlens
            rows.append(pool(own_TD, cu_seqlens, mode=pooling, normalize=normalize))

        hooks = [layers[depth].register_forward_pre_hook(keep, with_kwargs=True) for depth in depths]
        try:
            final_hidden(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(rows, dim=1)

    with borrowed(model, packed=True, dtype=next(model.parameters()).dtype), unnoticed(model, model):
        agree(leak_between(model, encoded))
        return gathered_rows(run, encoded, prefix=prefix, token_limit=token_limit, world=world)
