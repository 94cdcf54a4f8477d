"""Models small enough that their whole kernel can be had from full Jacobians, by torch's own autograd."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LAYERS = 4
VOCABULARY = 40
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES = {
    "llama": lambda **more: LlamaConfig(**_SHAPE, attention_bias=True, **more),
    "qwen2": lambda **more: Qwen2Config(**_SHAPE, **more),
    "qwen3": lambda **more: Qwen3Config(**_SHAPE, **more),
    "gemma": lambda **more: GemmaConfig(**_SHAPE, **more),
    "gemma3": lambda **more: Gemma3TextConfig(**_SHAPE, sliding_window=3, **more),
    "mixtral": lambda **more: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, **more),
    "qwen3-moe": lambda **more: Qwen3MoeConfig(
        **_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, **more
    ),
}
FAMILIES = sorted(_FAMILIES)

# Uneven lengths, one prompt in both sets, one that holds the padding token (0), one of a single token.
PROMPTS_A = [[3, 4, 5, 6, 7], [8, 0, 3, 9, 2, 30, 4]]
PROMPTS_B = [[3, 4, 5, 17, 7], [8, 0, 3, 9, 2, 30, 4], [12]]


def toy_model(family: str, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights large enough that no part of the kernel drowns."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(_FAMILIES[family](tie_word_embeddings=tied), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    # Grouped products take no float64.
    model.config._experts_implementation = "eager"
    return model


def jacobian(model: nn.Module, ids: list[int], counted: list[str]) -> dict[str, Tensor]:
    """∂z/∂θ of the first generated token's logits z: float64 [V, numel] for each counted parameter."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in counted}
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    rows = torch.eye(len(logits), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        gradients = torch.autograd.grad(
            logits, list(parameters.values()), rows, is_grads_batched=True, materialize_grads=True
        )
    return {name: gradient.flatten(1).double() for name, gradient in zip(parameters, gradients, strict=True)}


def reference(
    model: nn.Module, prompts_a: list, prompts_b: list, counted: list[str] | None = None
) -> tuple[Tensor, Tensor]:
    """‖K‖²_F [Na, Nb] and ⟨K_l, K⟩_F [layers, Na, Nb] from full Jacobians."""
    counted = [name for name, _ in model.named_parameters()] if counted is None else counted
    jacobians_a, jacobians_b = (
        [jacobian(model, ids, counted) for ids in ids_list] for ids_list in (prompts_a, prompts_b)
    )
    squared = torch.zeros(len(prompts_a), len(prompts_b), dtype=torch.float64)
    by_layer = torch.zeros(LAYERS, *squared.shape, dtype=torch.float64)
    for i, left in enumerate(jacobians_a):
        for j, right in enumerate(jacobians_b):
            parts = {name: left[name] @ right[name].T for name in counted}
            kernel = sum(parts.values())
            squared[i, j] = kernel.square().sum()
            for layer in range(LAYERS):
                own = [part for name, part in parts.items() if f"layers.{layer}." in name]
                by_layer[layer, i, j] = (sum(own) * kernel).sum() if own else 0
    return squared, by_layer


def zero3(model: PreTrainedModel, **config: Any) -> Any:
    """A DeepSpeed engine that trains the model under ZeRO-3 on the CPU; ``config``: more of its configuration."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 20},
            **config,
        },
    )
    return engine
