"""Settings that only move where things live train the same model: offloading, traces, modules of experts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from interrupted import told_to_stop
from rank_pool import RankPool
from torch import Tensor, nn
from toy import VOCABULARY, save_checkpoint, toy_checkpoint, toy_settings, write_config
from transformers import LlamaConfig

from dcr_scale import pipeline
from dcr_scale.config import load_config
from dcr_scale.errors import Preempted, UserError
from dcr_scale.models.checkpoint import Checkpoint

OFFLOADED = ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"]
# DeepSpeed compiles its reader of disks, which takes libaio's headers.
TO_A_DISK = AsyncIOBuilder().is_compatible(verbose=False)


@pytest.fixture
def config(tmp_path: Path) -> str:
    toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, tmp_path / "model")
    settings["look"] = {"enabled": False}
    return str(write_config(tmp_path, settings))


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_an_offloaded_run_trains_the_same_weights_and_resumes(config: str, tmp_path: Path, alone: None) -> None:
    compare_with_a_plain_run(config, tmp_path, ["align.method=lora"], OFFLOADED)


@pytest.mark.slow
@pytest.mark.skipif(not TO_A_DISK, reason="DeepSpeed's reader of disks cannot be compiled (libaio-dev)")
def test_a_run_with_its_optimiser_on_a_disk_trains_the_same_weights_and_resumes(tmp_path: Path, alone: None) -> None:
    """Of a model whose masters are large enough for DeepSpeed to write them: a MiB."""
    wide = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    settings = toy_settings(tmp_path, save_checkpoint(tmp_path / "model", wide))
    settings["look"] = {"enabled": False}
    # With AdamW's usual rates updates of elements whose gradients are rounding errors would differ.
    for stage in ("refine", "align"):
        settings[stage]["optimizer"] = {"lr": 1e-5}
    disk = tmp_path / "disk"
    moved = ["engine.offload_optimizer=nvme", f"engine.offload_folder={disk}"]
    compare_with_a_plain_run(str(write_config(tmp_path, settings)), tmp_path, [], moved)
    assert list(disk.rglob("optimizer"))


def compare_with_a_plain_run(config: str, folder: Path, common: list[str], moved: list[str]) -> None:
    """The second is interrupted in both stages, and goes on."""
    pipeline.run(load_config(config, [*common, f"run.dir={folder / 'plain'}"]))
    moved = [*common, *moved, f"run.dir={folder / 'moved'}"]
    for stage in ("refine", "align"):
        with told_to_stop(stage, 2), pytest.raises(Preempted):
            pipeline.run(load_config(config, moved))
    pipeline.run(load_config(config, moved))
    for stage in ("refined", "aligned"):
        expected, found = weights(folder / "plain" / stage), weights(folder / "moved" / stage)
        for name, values in expected.items():
            # Sums of squares and AdamW's loop are cut at other places there.
            assert torch.allclose(found[name], values, atol=1e-6), f"{stage}: {name}"


def test_offloading_to_a_disk_needs_to_know_which(config: str) -> None:
    with pytest.raises(UserError, match=r"engine.offload_optimizer=nvme needs engine.offload_folder"):
        load_config(config, ["engine.offload_optimizer=nvme"])


def test_a_trace_holds_the_steps_asked_for(config: str, tmp_path: Path, alone: None) -> None:
    pipeline.run(load_config(config, [f"run.dir={tmp_path / 'run'}", "profile.steps=1", "profile.after=1"]))
    for stage in ("refine", "align"):
        with gzip.open(tmp_path / "run" / "profile" / f"{stage}.json.gz", "rt", encoding="utf-8") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::mm", "ProfilerStep#1"} <= names and "ProfilerStep#2" not in names


@pytest.mark.parametrize("export", ["adapter", "both"])
def test_adapters_are_left_as_they_are_asked_for(config: str, tmp_path: Path, export: str, alone: None) -> None:
    run = tmp_path / "run"
    overrides = [f"run.dir={run}", "align.method=lora", f"align.lora.export={export}", "look.enabled=true"]
    summary = pipeline.run(load_config(config, [*overrides, "look.prompts=1", "look.max_new_tokens=2"]))
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "aligned").is_dir() == ("aligned" in summary["look"]) == (export == "both")
    assert "library_name: peft" in (run / "adapter" / "README.md").read_text(encoding="utf-8")


def test_without_lora_there_are_no_adapters_to_leave(config: str) -> None:
    with pytest.raises(UserError, match=r"align.method=full trains no adapters"):
        load_config(config, ["align.method=full", "align.lora.export=both"])


class Experts(nn.Module):
    """A block whose experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.experts[chosen](x)


class Layer(nn.Module):
    """A block of experts behind a weight that gets gradients through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 4, bias=False), Experts()

    def forward(self, x: Tensor, chosen: int) -> Tensor:
        return self.block(self.first(x), chosen).square().sum()


def train_experts() -> list[list[float]]:
    """On each rank: two steps in which it runs one expert; all experts' weights afterwards."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import EngineConfig, OptimizerConfig

    torch.manual_seed(0)
    settings = EngineConfig(precision="fp32", persistence_threshold=0)
    world = engines.start(settings)
    optimizer = OptimizerConfig(lr=0.1, warmup=0.0, schedule="constant", clip=0.0)
    module = Layer()
    engine = engines.Engine(module, settings, optimizer, steps=2, world=world)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 4), world.rank))
        engine.step(0.0)
    with engines.whole(module.parameters()):
        found = [parameter.detach().flatten().tolist() for parameter in module.parameters()]
    engine.close()
    return found


@pytest.mark.slow
def test_ranks_that_take_different_experts_do_not_wait_for_each_other(ranks: RankPool) -> None:
    torch.manual_seed(0)
    before = [parameter.detach().flatten().tolist() for parameter in Layer().parameters()]
    one, other = ranks.run(train_experts, world_size=2, timeout=300.0)
    assert one == other
    assert [after != initial for after, initial in zip(one, before, strict=True)] == [True, True, True, False]
