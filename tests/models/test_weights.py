"""Loading: bit for bit what from_pretrained loads, whatever the architecture, shards, ranks and dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_checkpoints import ARCHITECTURES, open_toy, partition, save_toy
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dcr_scale.models import checkpoint as checkpoint_module
from dcr_scale.models import disk
from dcr_scale.models.weights import load_weights, own_part


def blank_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A model of the folder's configuration whose every parameter is NaN."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_equal_from_pretrained(tmp_path: Path, architecture: str, sharded: bool) -> None:
    save_toy(tmp_path, architecture, sharded=sharded)
    checkpoint, tensor_map = open_toy(tmp_path)
    assert (len(checkpoint.files) > 1) == sharded

    model = blank_model(tmp_path)
    load_weights(model, checkpoint, tensor_map)

    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dtype_is_converted_as_torch_converts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    # Chunks smaller than the tensors, so that conversion crosses their borders.
    monkeypatch.setattr(disk, "CHUNK_BYTES", 1000)
    saved = save_toy(tmp_path, "llama", dtype=torch.bfloat16)
    model = blank_model(tmp_path, dtype)
    load_weights(model, *open_toy(tmp_path))
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(dtype)), name


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_trunk_takes_its_own_subset(tmp_path: Path, architecture: str) -> None:
    saved = save_toy(tmp_path, architecture, sharded=True)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 2
    trunk = AutoModel.from_config(config)
    trunk.norm = torch.nn.Identity()
    load_weights(trunk, *open_toy(tmp_path), prefix="model.")
    assert trunk.layers[1].input_layernorm.weight.numel()
    for name, parameter in trunk.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(f"model.{name}")), name


@pytest.mark.parametrize("world_size", [1, 2, 3, 64])
@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3-moe"])
def test_partitions_laid_end_to_end_are_the_parameter(tmp_path: Path, architecture: str, world_size: int) -> None:
    saved = save_toy(tmp_path, architecture, sharded=True)
    checkpoint, tensor_map = open_toy(tmp_path)
    ranks = []
    for rank in range(world_size):
        model = blank_model(tmp_path)
        for parameter in model.parameters():
            partition(parameter, rank, world_size)
        load_weights(model, checkpoint, tensor_map)
        ranks.append(dict(model.named_parameters()))
    for name, parameter in saved.named_parameters():
        padded = torch.cat([rank[name].ds_tensor for rank in ranks])
        assert torch.equal(padded[: parameter.numel()], parameter.detach().flatten()), name
        assert not padded[parameter.numel() :].any(), f"{name}: padding is not zero"
        assert torch.equal(torch.cat([own_part(rank[name]).values for rank in ranks]), parameter.flatten())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_ranks_together_read_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    save_toy(tmp_path, architecture)
    checkpoint, tensor_map = open_toy(tmp_path)
    read = []
    preadv = checkpoint_module.os.preadv

    def counting_preadv(*arguments):
        read.append(preadv(*arguments))
        return read[-1]

    monkeypatch.setattr(checkpoint_module.os, "preadv", counting_preadv)
    for rank in range(3):
        model = blank_model(tmp_path)
        for parameter in model.parameters():
            partition(parameter, rank, 3)
        load_weights(model, checkpoint, tensor_map)
    assert sum(read) == sum(info.nbytes for info in checkpoint.tensors.values())


def test_a_wrong_prefix_is_refused(tmp_path: Path) -> None:
    save_toy(tmp_path, "llama")
    trunk = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is not in the tensor map"):
        load_weights(trunk, *open_toy(tmp_path), prefix="transformer.")
