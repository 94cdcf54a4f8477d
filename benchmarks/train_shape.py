"""A model of a published shape with random weights, and random prompts: what a step costs, without a download."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from dcr_scale.config import Config, RetentionConfig
from dcr_scale.data.contrast import ContrastPrompt, EncodedContrast, EncodedPrompts

SHAPES = {
    "llama3_8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "toy": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
    },
}
# Tokens of a pair's two prompts on average, the same for all pairs so that all batches are of one size; and how far
# from it either may be.
_MEAN = 126
_SPREAD = 96


def write_model(folder: Path, shape: str, layers: int) -> None:
    """A checkpoint of ``layers`` + 1 layers, one shard each, bf16: a trunk of ``layers`` is all that stage 1 reads."""
    config = LlamaConfig(
        **SHAPES[shape],
        num_hidden_layers=layers + 1,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    # Drawing eight billion numbers takes minutes; rows of a repeated block differ as its length divides no width.
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    index = {}
    for part, names in parts.items():
        tensors = {}
        for name in names:
            like = model.get_parameter(name)
            numbers = block.repeat(like.numel() // len(block) + 1)[: like.numel()].view(like.shape)
            tensors[name] = numbers if like.dim() > 1 else torch.ones(like.shape, dtype=torch.bfloat16)
        file = f"model-{part}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def settings(config: Config, *, layers: int, tokens: int, packs: int, ranks: int) -> None:
    """Set stage 1 to ``packs`` packs of at most ``tokens`` tokens a step on each rank, and nothing beside them."""
    assert config.refine is not None
    config.refine.layer = layers
    config.refine.micro_batch_tokens = tokens if packs > 1 else None
    config.refine.retention = RetentionConfig(weight=0)
    # Packs of uneven prompts do not come out exactly even.
    config.refine.batch_size = ranks * 2 * (packs * (tokens - tokens // 64) // (2 * _MEAN))
    config.refine.sampling = "matched"


def prompts(shape: str, batch_size: int) -> EncodedContrast:
    """Pairs of random prompts of uneven length (30 to 222 tokens), enough for four batches."""
    generator, vocabulary = random.Random(0), SHAPES[shape]["vocab_size"]
    sides = {}
    for side, pairs in (("train", 2 * batch_size), ("heldout", 2)):
        texts, ids = [], []
        for pair in range(pairs):
            apart = generator.randint(-_SPREAD, _SPREAD)
            for label, length in (("seemingly_toxic", _MEAN + apart), ("toxic", _MEAN - apart)):
                name = f"{side} {pair}"
                texts.append(ContrastPrompt(f"{name} {label}", label, name, name, "random"))
                ids.append([generator.randrange(vocabulary) for _ in range(length)])
        sides[side] = EncodedPrompts(tuple(texts), tuple(ids))
    return EncodedContrast(sides["train"], sides["heldout"])
