"""The map from parameters to a file's tensors: names, fused and transposed layouts, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_checkpoints import open_toy, partition, save_toy, world_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Interleave, PermuteForRope, Split, Transpose, WeightConverter

from dcr_scale.errors import UserError
from dcr_scale.models import tensor_map as tensor_map_module
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.tensor_map import Piece
from dcr_scale.models.weights import load_weights

DOWN = "model.layers.1.mlp.down_proj.weight"
QKV = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def assert_loads(folder: Path, saved: torch.nn.Module) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    load_weights(model, *open_toy(folder))
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_experts_are_runs_of_whole_source_tensors_in_numeric_order(tmp_path: Path) -> None:
    save_toy(tmp_path, "mixtral")
    _, tensor_map = open_toy(tmp_path)
    pieces = tensor_map.pieces["model.layers.0.mlp.experts.gate_up_proj"]
    size = 40 * 24
    assert pieces[:3] == (
        Piece("model.layers.0.block_sparse_moe.experts.0.w1.weight", 0, 0, size),
        Piece("model.layers.0.block_sparse_moe.experts.0.w3.weight", 0, size, size),
        Piece("model.layers.0.block_sparse_moe.experts.1.w1.weight", 0, 2 * size, size),
    )
    assert pieces[-1].source == "model.layers.0.block_sparse_moe.experts.10.w3.weight"
    assert not tensor_map.scattered


def test_old_and_prefixless_names_are_found(tmp_path: Path) -> None:
    saved = save_toy(tmp_path, "llama-tied")

    def as_base_model(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    rewrite(tmp_path, as_base_model)
    assert_loads(tmp_path, saved)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_tensor_is_found_under_either_name(tmp_path: Path, kept: str) -> None:
    saved = save_toy(tmp_path, "llama-tied")

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept != "both":
            del tensors[({"lm_head.weight", "model.embed_tokens.weight"} - {kept}).pop()]

    rewrite(tmp_path, keep)
    assert_loads(tmp_path, saved)
    _, tensor_map = open_toy(tmp_path)
    assert "lm_head.weight" in tensor_map and "model.embed_tokens.weight" in tensor_map
    assert len(tensor_map.written_as("model.embed_tokens.weight")) == (2 if kept == "both" else 1)


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        tensors[name] = tensors[name].T


def interleaved(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].view(rows, 2, columns // 2).transpose(1, 2).reshape(rows, columns)


def fused(tensors: dict[str, torch.Tensor]) -> None:
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        parts = [tensors.pop(prefix + name) for name in QKV]
        tensors[f"{prefix}self_attn.qkv.weight"] = torch.cat(parts)


def permuted(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("q_proj.weight")]:
        tensors[name] = tensors[name].view(3, 2, 4, 24).transpose(1, 2).reshape(24, 24)


LAYOUTS = {
    "transposed": (
        transposed,
        WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Transpose()]),
    ),
    "interleaved": (
        interleaved,
        WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Interleave(1)]),
    ),
    "fused": (fused, WeightConverter("self_attn.qkv.weight", QKV, [Split()])),
    "permuted": (
        permuted,
        WeightConverter("self_attn.q_proj.weight", "self_attn.q_proj.weight", [PermuteForRope()]),
    ),
}


@pytest.mark.parametrize("small", [0, 2**22], ids=["large", "small"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_transformers_can_convert_goes_in_and_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, small: int
) -> None:
    relayout, converter = LAYOUTS[layout]
    source, destination = tmp_path / "source", tmp_path / "out"
    saved = save_toy(source, "llama")
    rewrite(source, relayout)
    monkeypatch.setattr(tensor_map_module, "get_model_conversion_mapping", lambda model: [converter])
    monkeypatch.setattr(tensor_map_module, "_SMALL", small)

    checkpoint, tensor_map = open_toy(source)
    assert bool(tensor_map.scattered) == (small == 0 and layout in {"transposed", "interleaved"})
    assert_loads(source, saved)

    # Writing every parameter as it is gives the source's bytes back.
    everything = dict(saved.named_parameters())
    with torch.no_grad():
        everything["model.norm.weight"].add_(1)
    export_checkpoint(destination, checkpoint, tensor_map, everything, world=world_of())
    rewrite(source, lambda tensors: tensors["model.norm.weight"].add_(1))
    exported, expected = (load_file(folder / "model.safetensors") for folder in (destination, source))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor), name


def test_scattered_parameters_are_partitioned_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    relayout, converter = LAYOUTS["transposed"]
    saved = save_toy(tmp_path, "llama")
    rewrite(tmp_path, relayout)
    monkeypatch.setattr(tensor_map_module, "get_model_conversion_mapping", lambda model: [converter])
    monkeypatch.setattr(tensor_map_module, "_SMALL", 0)
    partitions = []
    for rank in range(3):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        for parameter in model.parameters():
            partition(parameter, rank, 3)
        load_weights(model, *open_toy(tmp_path))
        partitions.append(model.get_parameter(DOWN).ds_tensor)
    assert torch.equal(torch.cat(partitions), saved.get_parameter(DOWN).flatten())


def test_arithmetic_is_no_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Negate(Transpose):
        def convert(self, input_dict, source_patterns, target_patterns, **_):
            return {target_patterns[0]: -next(iter(input_dict.values()))[0]}

    save_toy(tmp_path, "llama")
    converter = WeightConverter("mlp.down_proj.weight", "mlp.down_proj.weight", [Negate()])
    monkeypatch.setattr(tensor_map_module, "get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(UserError, match=r"down_proj\.weight.* by more than moving elements"):
        open_toy(tmp_path)


def lose(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("llama", lose(DOWN), rf"1 missing tensor: {DOWN}; the download is incomplete"),
        ("llama", lose("lm_head.weight"), r"1 missing tensor: lm_head\.weight"),
        (
            "llama",
            lambda tensors: tensors.update(stray=torch.ones(2), other=torch.ones(1)),
            r"2 unexpected tensors: other, stray; the LlamaForCausalLM",
        ),
        (
            "llama",
            lambda tensors: tensors.update({DOWN: torch.ones(24, 41)}),
            r"give model\.layers\.1\.mlp\.down_proj\.weight the shape \[24, 41\], .* for \[24, 40\]",
        ),
        (
            "llama-tied",
            lambda tensors: tensors.update({"lm_head.weight": torch.ones(101, 24)}),
            "set tie_word_embeddings to false",
        ),
        (
            "llama",
            lambda tensors: tensors.update({DOWN: torch.ones(24, 40, dtype=torch.int8)}),
            rf"1 quantised tensor: {DOWN}; .* give the original",
        ),
        (
            "mixtral",
            lose("model.layers.0.block_sparse_moe.experts.3.w2.weight"),
            r"experts\.down_proj the shape \[10, 24, 40\], but config\.json asks for \[11, 24, 40\]: a",
        ),
        (
            "mixtral",
            lose("model.layers.0.block_sparse_moe.experts.3.w1.weight"),
            r"gate_up_proj cannot be put together from 21 tensors: .*; one is missing or has a wrong shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, architecture: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    save_toy(tmp_path, architecture)
    rewrite(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        open_toy(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_quantised_configuration_is_refused(tmp_path: Path) -> None:
    save_toy(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantization_config; quantised weights cannot be trained"):
        open_toy(tmp_path)
