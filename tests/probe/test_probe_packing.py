"""Prompts packed together must not see each other, and a model may mix tokens elsewhere than in its attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rank_pool import RankPool
from torch import nn
from toy_models import PROMPTS_A, PROMPTS_B, toy_model
from transformers import AutoModelForCausalLM, Lfm2Config

from dcr_scale.probe import KernelProbe
from dcr_scale.probe.activations import rows_at_depths
from dcr_scale.probe.tail_form import estimate_tail_form
from dcr_scale.world import World

LINEARS = r"(w1|w2|w3|in_proj|out_proj|q_proj|k_proj|v_proj)\.weight"
SEEN = r"^prompts packed together see each other in this model \(activations move by \d+%"


def short_convolutions() -> nn.Module:
    torch.manual_seed(1)
    config = Lfm2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


class SeesTheTokenBefore(nn.Module):
    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x + F.pad(x[:, :-1], (0, 0, 1, 0)))


def token_shift() -> nn.Module:
    model = toy_model("llama")
    model.model.layers[1].mlp = SeesTheTokenBefore(model.model.layers[1].mlp)
    return model


def test_they_are_padded_where_packed_ones_would_see_each_other():
    model = short_convolutions()
    probe = KernelProbe(model, parameters=LINEARS)
    found = probe.measure(PROMPTS_A, PROMPTS_B)
    padded = KernelProbe(model, parameters=LINEARS, packed=False).measure(PROMPTS_A, PROMPTS_B)
    assert not probe.packed
    assert torch.equal(found.squared, padded.squared)
    with pytest.raises(ValueError, match=rf"{SEEN}.*; use packed=False$"):
        KernelProbe(model, parameters=LINEARS, packed=True).measure(PROMPTS_A)


def test_they_stay_packed_where_attention_alone_mixes_tokens():
    probe = KernelProbe(toy_model("mixtral", dtype=torch.bfloat16))
    probe.measure(PROMPTS_A)
    assert probe.packed


def test_what_cannot_pad_refuses():
    more = {"prefix": 0, "pooling": "mean", "token_limit": 100}
    with pytest.raises(ValueError, match=SEEN):
        estimate_tail_form(token_shift(), PROMPTS_A, 1, probes=2, seed=0, **more)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=SEEN):
        rows_at_depths(token_shift(), PROMPTS_A, [1], normalize=True, world=world, **more)


def one_rank_s_prompts_see_each_other(packed: bool | None) -> str:
    model = token_shift() if torch.distributed.get_rank() == 1 else toy_model("llama")
    probe = KernelProbe(model, packed=packed)
    try:
        probe.measure(PROMPTS_A)
    except ValueError as error:
        return str(error)
    return "packed" if probe.packed else "padded"


def test_ranks_agree_on_it(ranks: RankPool):
    assert ranks.run(one_rank_s_prompts_see_each_other, None, world_size=2) == ["padded"] * 2
    refused = ranks.run(one_rank_s_prompts_see_each_other, True, world_size=2)
    assert refused[0] == refused[1] != "packed"
