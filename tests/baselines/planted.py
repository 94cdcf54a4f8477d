"""A model whose refusals are known: built by hand, so that a fit can be held against what was planted.

Prompts are random letters. An ``X`` in one alarms the model, a ``Y`` says that it is toxic. The first layer's attention
gathers both at the last token, along :data:`ALARM` and :data:`TOXIC`; each makes it answer ``Z``, which is its only
refusal. Seemingly toxic prompts hold an X and a little Y, toxic ones a lot of Y, harmless ones neither.
"""

from __future__ import annotations

import random

import torch
from toy import LAYERS, toy_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dcr_scale.baselines.prompts import Divided, Prompts

WIDTH, HEAD = 32, 8
ALARM, TOXIC = torch.eye(WIDTH)[5], torch.eye(WIDTH)[6]
_SEES_X, _SEES_Y, _CONSTANT = 1, 0, 7
_LENGTH = 24


def planted_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD,
        )
    ).eval()
    x, y, z, fine = (tokenizer.convert_tokens_to_ids(letter) for letter in "XYZA")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" not in name and name != "model.norm.weight":
                parameter.zero_()
        embedding = model.model.embed_tokens.weight
        embedding[:, 8:] = torch.randn(len(embedding), WIDTH - 8) * 0.2
        embedding[:, _CONSTANT] = 1.0
        embedding[x, _SEES_X] = embedding[y, _SEES_Y] = 4.0
        # Queries and keys are zero, so attention is the mean over the past.
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, _SEES_X] = attention.v_proj.weight[1, _SEES_Y] = 1.0
        # And something of every prompt, as in any model.
        attention.v_proj.weight[2, _CONSTANT] = attention.o_proj.weight[4, 2] = 0.5
        attention.o_proj.weight[ALARM.argmax(), 0] = attention.o_proj.weight[TOXIC.argmax(), 1] = 10.0
        model.lm_head.weight[z] = 6 * (ALARM + TOXIC)
        model.lm_head.weight[fine, _CONSTANT] = 10.0
    return model


def planted_prompts(size: int = 24, *, alarms_in_harmless: int = 0) -> Prompts:
    """The three sets, three quarters of each to train on."""
    draw = random.Random(0)

    def prompt(x: int, y: int) -> str:
        letters = [*"X" * x, *"Y" * y, *(draw.choice("bcdfghjk") for _ in range(_LENGTH - x - y))]
        draw.shuffle(letters)
        return " ".join(letters)

    def divided(x: int, y: int) -> Divided:
        texts = [prompt(x, y) for _ in range(size)]
        return Divided(tuple(texts[: size * 3 // 4]), tuple(texts[size * 3 // 4 :]))

    return {"seemingly_toxic": divided(5, 1), "toxic": divided(0, 6), "harmless": divided(alarms_in_harmless, 0)}


def planted() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = toy_tokenizer()
    return planted_model(tokenizer), tokenizer
