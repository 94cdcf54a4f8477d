"""Small random models of several architectures, saved in Hub layout by transformers itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.tensor_map import TensorMap, build_tensor_map
from dcr_scale.world import World

# Odd sizes, so that two or three ranks never divide a tensor evenly.
_SHAPE = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ARCHITECTURES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SHAPE, tie_word_embeddings=True),
    # Eleven experts: as text, expert 10 comes before expert 2.
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=11, num_experts_per_tok=2),
    "qwen3-moe": Qwen3MoeConfig(**_SHAPE, num_experts=11, num_experts_per_tok=2, moe_intermediate_size=16),
}


def save_toy(
    folder: Path, architecture: str, *, dtype: torch.dtype = torch.float32, sharded: bool = False
) -> PreTrainedModel:
    """Save a random model to ``folder``, in one file or in shards of at most 20 kB; returns it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def open_toy(folder: Path) -> tuple[Checkpoint, TensorMap]:
    checkpoint = Checkpoint.open(folder)
    return checkpoint, build_tensor_map(skeleton(folder), checkpoint)


def world_of(rank: int = 0, world_size: int = 1) -> World:
    """A rank on the CPU."""
    return World(rank, world_size, rank, world_size, torch.device("cpu"))


def partition(parameter: torch.nn.Parameter, rank: int, world_size: int) -> None:
    """Leave on ``parameter`` what ZeRO-3 leaves there: an undefined partition of a flattened tensor."""
    parameter.ds_id = id(parameter)
    parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
    size = -(-parameter.ds_numel // world_size)
    parameter.ds_tensor = torch.full((size,), float("nan"), dtype=parameter.dtype)
    start = min(rank * size, parameter.ds_numel)
    own = parameter.detach().view(-1)[start : start + size]
    parameter.ds_tensor[: own.numel()] = own
    parameter.ds_tensor.ds_numel = size
    parameter.ds_zero_partition_rank = rank
    parameter.data = torch.empty(0, dtype=parameter.dtype)
