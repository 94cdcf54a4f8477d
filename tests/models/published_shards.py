"""Llama-3-70B's checkpoint in small: every name, and the shard that each lies in, as published; narrow tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

# https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SHARDS = 30


def shards(config: LlamaConfig) -> dict[str, list[str]]:
    """Which tensors lie in which file: filled up to 5 GB in the model's order, as transformers saves in bf16."""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB"
    )
    return plan.filename_to_tensors


def save_narrow(folder: Path, config: LlamaConfig) -> None:
    """Random weights of ``config``'s small shapes, in bf16, in the files of the published ones."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for file, names in shards(LlamaConfig(**SHAPE)).items():
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.randn(shapes[name]).mul_(0.1).bfloat16()
            for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
