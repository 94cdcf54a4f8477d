"""Attention over packs: every prompt attends to itself and to the shared prefix, and to nothing else.

transformers hands each layer's queries, keys and values to a function registered by name, and passes the keyword
``packing`` (a :class:`~dcr_scale.data.packing.PackLayout`) from the model's forward down to it. A name without a
mask function gets no mask from transformers, so the layout alone decides who sees whom: there is no detection from
``position_ids`` that could silently fail to happen.

Shape suffixes: T tokens of the pack, K keys (prefixes repeated), H heads, G key-value heads, D head width, N prompts,
L longest prompt, P prefix.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from dcr_scale.data.packing import PackLayout
from dcr_scale.errors import UserError

# No "flash" and no "sdpa": transformers takes any name with these in it for its own, and would look for a kernel of
# that name on the Hub or apply its own limits.
FLASH_ATTN = "dcr_dao_varlen"
TORCH_VARLEN = "dcr_torch_varlen"
SDPA = "dcr_dense"


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The registered name for ``model.attention``: what was asked for, or the best that runs here.

    Raises UserError where flash_attn or torch_varlen is asked for and cannot run.
    """
    half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    has_flash = half_on_gpu and importlib.util.find_spec("flash_attn") is not None
    has_varlen = half_on_gpu and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if requested == "flash_attn" and not has_flash:
        raise UserError(
            "model.attention=flash_attn needs a GPU, bf16 and the package flash-attn (pip install -e '.[gpu]' in the "
            f"repository); found {device.type}, {dtype}; model.attention=auto takes what there is"
        )
    if requested == "torch_varlen" and not has_varlen:
        raise UserError(
            f"model.attention=torch_varlen needs a GPU and bf16; found {device.type}, {dtype}; "
            "model.attention=auto takes what there is"
        )
    if requested == "flash_attn" or (requested == "auto" and has_flash):
        return FLASH_ATTN
    if requested == "torch_varlen" or (requested == "auto" and has_varlen):
        return TORCH_VARLEN
    return SDPA


def _flash_attn(q_THD, k_KGD, v_KGD, layout, *, scaling, window, softcap, dropout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    # Causal masks are aligned to the last key, so a prompt's queries see the whole prefix before them.
    return flash_attn_varlen_func(
        q_THD,
        k_KGD,
        v_KGD,
        cu_seqlens_q=layout.cu_queries,
        cu_seqlens_k=layout.cu_keys,
        max_seqlen_q=max(layout.prefix, layout.longest),
        max_seqlen_k=layout.prefix + layout.longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _torch_varlen(q_THD, k_KGD, v_KGD, layout, *, scaling, window, softcap, dropout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap or dropout:
        raise UserError(
            "torch's varlen attention has neither soft-capping nor dropout, which this model's attention asks for; "
            "use model.attention=flash_attn or sdpa"
        )
    groups = q_THD.shape[1] // k_KGD.shape[1]
    attended_THD = varlen_attn(
        q_THD,
        k_KGD.repeat_interleave(groups, dim=1),
        v_KGD.repeat_interleave(groups, dim=1),
        layout.cu_queries,
        layout.cu_keys,
        max(layout.prefix, layout.longest),
        layout.prefix + layout.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return cast(Tensor, attended_THD)  # a tuple only where log-sum-exps are asked for


def _ragged(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a kernel over ragged tokens what it takes: tokens first, the prefix repeated before each prompt's keys."""

    def compute(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, layout: PackLayout, **options: Any) -> Tensor:
        q_THD, k_KGD, v_KGD = (x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD))
        if layout.key_index is not None:
            k_KGD, v_KGD = k_KGD[layout.key_index], v_KGD[layout.key_index]
        return kernel(q_THD, k_KGD, v_KGD, layout, **options)

    return compute


def adapted(compute: Callable[..., Tensor]) -> Callable:
    """Make a transformers attention function of a computation over one pack.

    The function takes ``query`` [1, H, T, D], ``key`` and ``value`` [1, G, T, D] and gives [1, T, H, D].
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        packing: PackLayout | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        _check(module, query, packing, unused)
        out_THD = compute(
            query[0],
            key[0],
            value[0],
            packing,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            window=sliding_window,
            softcap=softcap,
            dropout=dropout,
        )
        return out_THD[None], None

    return attend


def _padded_rows(
    q_HTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    layout: PackLayout,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """SDPA anywhere PyTorch runs: prompts as rows of padded batches, one batch for each class of length, so that
    padding at most doubles a row. That is the block-diagonal mask over the pack, its empty blocks never computed."""
    groups = q_HTD.shape[0] // k_GTD.shape[0]
    k_HTD, v_HTD = k_GTD.repeat_interleave(groups, dim=0), v_GTD.repeat_interleave(groups, dim=0)

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return masked_attention(q, k, v, mask, scaling, softcap, dropout)

    P = layout.prefix
    pieces, tokens = [], []
    if P:
        at = torch.arange(P, device=q_HTD.device)
        prefix_HPD = core(q_HTD[None, :, :P], k_HTD[None, :, :P], v_HTD[None, :, :P], _causal(at, at, window))[0]
        pieces.append(prefix_HPD.transpose(0, 1))
        tokens.append(at)
    for rows in layout.padded_rows:
        N, L = rows.index.shape
        q_NHLD, k_NHLD, v_NHLD = (x[:, rows.index].transpose(0, 1) for x in (q_HTD, k_HTD, v_HTD))
        if P:
            k_NHLD = torch.cat([k_HTD[None, :, :P].expand(N, -1, -1, -1), k_NHLD], dim=2)
            v_NHLD = torch.cat([v_HTD[None, :, :P].expand(N, -1, -1, -1), v_NHLD], dim=2)
        at_key = torch.arange(P + L, device=q_HTD.device)
        out_NHLD = core(q_NHLD, k_NHLD, v_NHLD, _causal(at_key[P:], at_key, window))
        pieces.append(out_NHLD.transpose(1, 2).flatten(0, 1)[rows.inside])
        tokens.append(rows.tokens)
    order = torch.cat(tokens).argsort()
    return torch.cat(pieces)[order]


def _causal(at_query: Tensor, at_key: Tensor, window: int | None) -> Tensor:
    """bool [queries, keys]: keys at or before the query's position, and within the sliding window if there is one."""
    distance = at_query[:, None] - at_key[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, dropout: float
) -> Tensor:
    """Attention under a mask (bool, broadcast to [N, H, queries, keys]) of q, k, v [N, H, tokens, D], as q's shape."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
    # Gemma 2 squashes the scores before the mask, which SDPA cannot do.
    scores = q @ k.transpose(-2, -1) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return F.dropout(scores.float().softmax(-1).to(v.dtype), dropout) @ v


def _check(module: nn.Module, query: Tensor, packing: PackLayout | None, unused: dict) -> None:
    if packing is None:
        raise UserError(
            f"{type(module).__name__} does not pass keywords down to its attention, so prompts packed together "
            "would see each other; this model cannot be trained here"
        )
    if unused.get("s_aux") is not None:
        raise UserError(f"{type(module).__name__} has attention sinks, which packed attention does not support")
    assert query.shape[0] == 1 and query.shape[2] == packing.tokens, "the pack's layout is another batch's"


AttentionInterface.register(FLASH_ATTN, adapted(_ragged(_flash_attn)))
AttentionInterface.register(TORCH_VARLEN, adapted(_ragged(_torch_varlen)))
AttentionInterface.register(SDPA, adapted(_padded_rows))
