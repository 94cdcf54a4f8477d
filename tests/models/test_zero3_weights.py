"""The same under DeepSpeed itself: parameters made by zero.Init are filled, gathered and exported right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from toy_checkpoints import open_toy, save_toy, world_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.lora import lora_deltas
from dcr_scale.models.weights import is_partitioned, load_weights, own_part

pytestmark = pytest.mark.slow


def load_and_export(source: str, destination: str, merged: str) -> dict[str, torch.Tensor]:
    """On each rank: build under zero.Init, load, gather; double what is in layer 0 and export; merge LoRA."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from peft import LoraConfig, get_peft_model

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        # The norms' parameters are persistent, the others are not.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 30},
    }
    with deepspeed.zero.Init(config_dict_or_path=settings), no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    assert all(is_partitioned(parameter) for parameter in model.parameters())
    checkpoint, tensor_map = open_toy(Path(source))
    load_weights(model, checkpoint, tensor_map)

    gathered = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            gathered[name] = parameter.detach().clone()
    changed = {name: p for name, p in model.named_parameters() if name.startswith("model.layers.0.")}
    for parameter in changed.values():
        own_part(parameter).values.mul_(2)
    export_checkpoint(Path(destination), checkpoint, tensor_map, changed, world=world_of(rank, world_size))

    base = dict(model.named_parameters())
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    deltas = lora_deltas(wrapped, deepspeed.zero.GatheredParameters)
    changed = {name: parameter for name, parameter in base.items() if parameter in deltas}
    assert len(changed) == 6
    export_checkpoint(
        Path(merged),
        checkpoint,
        tensor_map,
        changed,
        deltas=deltas,
        world=world_of(rank, world_size),
    )
    return gathered


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral"])
def test_zero_init_parameters_are_filled_and_exported(tmp_path: Path, ranks: RankPool, architecture: str) -> None:
    source, destination, merged = (tmp_path / name for name in ("source", "out", "merged"))
    saved = save_toy(source, architecture, sharded=True)
    results = ranks.run(load_and_export, str(source), str(destination), str(merged), world_size=2, timeout=300.0)
    for gathered in results:
        for name, parameter in saved.named_parameters():
            assert torch.equal(gathered[name], parameter), name
    exported = AutoModelForCausalLM.from_pretrained(destination)
    for name, parameter in saved.named_parameters():
        factor = 2 if name.startswith("model.layers.0.") else 1
        assert torch.equal(exported.get_parameter(name), factor * parameter), name
    with_updates = AutoModelForCausalLM.from_pretrained(merged)
    updated = {n for n, p in saved.named_parameters() if not torch.equal(with_updates.get_parameter(n), p)}
    assert "model.layers.2.self_attn.q_proj.weight" in updated
    assert len(updated) == 6
