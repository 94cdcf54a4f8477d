"""Checkpoints of 70 billion parameters: all their names and shards through both stages, and their widest tensors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from published_shards import SHAPE, SHARDS, save_narrow, shards
from rank_pool import RankPool
from safetensors.torch import save_file
from toy import REPOSITORY, VOCABULARY, toy_settings, toy_tokenizer, write_config
from toy_checkpoints import skeleton, world_of
from transformers import AutoModelForCausalLM, LlamaConfig

from dcr_scale.models import verify
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.export import export_checkpoint
from dcr_scale.models.tensor_map import build_tensor_map
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.models.weights import own_part

pytestmark = pytest.mark.slow


def test_the_layout_is_the_published_one() -> None:
    files = shards(LlamaConfig(**SHAPE))
    assert len(files) == SHARDS
    assert next(iter(files)) == "model-00001-of-00030.safetensors"
    assert sum(map(len, files.values())) == 80 * 9 + 3


def run_on_rank(config: str) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from unittest import mock

    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.pipeline import Run

    loaded = load_config(config, [])
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        return Run(loaded, engines.start(loaded.engine)).run()


def test_80_layers_in_30_shards_go_through_both_stages_on_four_ranks(tmp_path: Path, ranks: RankPool) -> None:
    narrow = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=SHAPE["num_hidden_layers"],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        head_dim=8,
        dtype="bfloat16",
    )
    save_narrow(tmp_path / "model", narrow)
    toy_tokenizer().save_pretrained(tmp_path / "model")
    settings = toy_settings(tmp_path, tmp_path / "model")
    settings["refine"].update(layer=32, steps=1, batch_size=8)
    settings["refine"]["retention"] = {"weight": 0.0}
    settings["align"].update(method="lora", examples=8, batch_size=8, micro_batch_tokens=512)
    settings["align"]["lora"] = {"targets": ["q_proj", "down_proj"]}
    settings["look"]["enabled"] = False
    # Every parameter stays whole after its first use, or four ranks on two cores would gather 723 tensors a pass.
    settings["engine"].update(persistence_threshold=10**6, persistence_total=10**9)
    config = write_config(tmp_path, settings)
    summaries = ranks.run(run_on_rank, str(config), world_size=4, timeout=600.0)
    assert summaries[0]["refine"]["updates"] == summaries[0]["align"]["updates"] == 1

    source, refined, aligned = (
        Checkpoint.open(folder) for folder in (tmp_path / "model", tmp_path / "run/refined", tmp_path / "run/aligned")
    )
    assert len(aligned.files) == SHARDS
    assert source.tensors == refined.tensors == aligned.tensors
    index = "model.safetensors.index.json"
    assert (aligned.folder / index).read_bytes() == (source.folder / index).read_bytes()
    for one, other, trained in (
        (source, refined, lambda name: int(name.split(".")[2]) < 32 if ".layers." in name else False),
        (refined, aligned, lambda name: "q_proj" in name or "down_proj" in name),
    ):
        changed = [name for name in one.tensors if not torch.equal(one.read(name), other.read(name))]
        assert changed and all(trained(name) for name in changed)
        # Steps of 1e-3 show in bf16 nearly everywhere; norms of one weight each may stay.
        assert len(changed) > 0.7 * sum(map(trained, one.tensors))
        assert not list(verify.damage(other.folder))


# --- real widths ------------------------------------------------------------------------------------------

LAYER = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1}, tie_word_embeddings=True)


def load_and_export(source: str, destination: str) -> dict[str, int]:
    """On each rank: a layer and the embedding, both at full width, in and out; this rank's peak and partition."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import EngineConfig
    from dcr_scale.models.trunk import build_model

    world = world_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    engines.start(EngineConfig())
    with engines.partitioned(EngineConfig(precision="bf16"), torch.bfloat16, world.device):
        model = build_model(LAYER, attention="sdpa", dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(source)
    tensor_map = build_tensor_map(skeleton(Path(source)), checkpoint)
    load_verified(model, checkpoint, tensor_map, world)
    # Signs alone change: exact in every dtype.
    name = "model.layers.0.mlp.down_proj.weight"
    changed = {name: model.get_parameter(name), "model.embed_tokens.weight": model.model.embed_tokens.weight}
    for parameter in changed.values():
        own_part(parameter).values.neg_()
    export_checkpoint(Path(destination), checkpoint, tensor_map, changed, world=world)
    return {"held": sum(own_part(parameter).values.numel() for parameter in model.parameters())}


def test_a_layer_and_the_embedding_at_full_width_go_in_and_out(tmp_path: Path, ranks: RankPool) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(LAYER).named_parameters()}
    nbytes = 2 * sum(shape.numel() for shape in shapes.values())
    free_disk, free_memory = shutil.disk_usage(tmp_path).free, psutil.virtual_memory().available
    # Twice on the disk; in memory the partitions, a whole tensor on each of two ranks, and the imports.
    if free_disk < 2.5 * nbytes or free_memory < nbytes + 2 * 2 * 128256 * 8192 + 3 * 2**30:
        pytest.skip(f"{free_disk / 2**30:.1f} GiB of disk and {free_memory / 2**30:.1f} GiB of memory are free")
    source, destination = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    index = {}
    for number, (name, shape) in enumerate(shapes.items()):
        file = f"model-{number:05d}.safetensors"
        # A pattern in the bytes of bf16, made at the speed of memory.
        block = torch.randint(0, 15000, (2**20,), dtype=torch.int16)
        values = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(torch.bfloat16).view(shape)
        save_file({name: values}, source / file)
        index[name] = file
        del values
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    LAYER.save_pretrained(source)
    try:
        results = ranks.run(load_and_export, str(source), str(destination), world_size=2, timeout=500.0)
        assert sum(result["held"] for result in results) == nbytes // 2
        before, after = Checkpoint.open(source), Checkpoint.open(destination)
        assert before.tensors == after.tensors
        for name, info in before.tensors.items():
            sign = -1 if name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight") else 1
            for start in range(0, info.numel, 2**26):
                count = min(2**26, info.numel - start)
                one, other = before.read(name, start, count), after.read(name, start, count)
                assert torch.equal(sign * one, other), name
        assert not list(verify.damage(destination))
    finally:
        shutil.rmtree(source)
        shutil.rmtree(destination, ignore_errors=True)


# --- cost -------------------------------------------------------------------------------------------------


def test_four_ranks_read_the_file_once_and_hold_no_more_than_their_part_and_a_tensor(tmp_path: Path) -> None:
    """In fresh processes, as the benchmark measures it: the kernel's count of bytes, and peaks of memory."""
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/checkpoint_io.py", "--ranks", "4", "--width", "1024", "--layers", "6"]
    command += ["--rounds", "1", "--arms", "ours", "--folder", str(tmp_path), "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["checkpoint_bytes"] > 200e6
    load, export = found["ours"]["load"], found["ours"]["export"]
    assert 1.0 <= load["bytes_read_ratio"] <= 1.05
    assert 1.0 <= export["bytes_written_ratio"] <= 1.05
    assert load["peak_bytes_a_rank"] <= found["ours"]["partition_bytes"] + found["largest_tensor_bytes"]
    assert export["peak_bytes_a_rank"] <= found["largest_tensor_bytes"]
