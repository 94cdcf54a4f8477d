"""The plan's bytes against those counted in runs: what ranks hold, keep, send, read and write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from counted_run import count_probed, count_run
from rank_pool import RankPool
from toy import VOCABULARY, save_checkpoint, toy_settings, write_config
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from dcr_scale.config import load_config
from dcr_scale.models.trunk import read_config
from dcr_scale.planning.activations import model_activations, trunk_activations
from dcr_scale.planning.finding import FoundModel
from dcr_scale.planning.hardware import DEVICES, GIB
from dcr_scale.planning.stages import Cluster, Planner, StagePlan
from dcr_scale.planning.workload import Assumed, measure_lengths

pytestmark = pytest.mark.slow


def shape(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": 3 * hidden // 2,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


# Ranks, model, settings.
CASES: dict[str, tuple[int, PretrainedConfig, list[str]]] = {
    "alone": (1, LlamaConfig(**shape(128, 4)), []),
    "adapters": (
        2,
        LlamaConfig(**shape(160, 5, tie_word_embeddings=True)),
        ["engine.precision=bf16", "model.gradient_checkpointing=true", "align.method=lora", "engine.max_live=150000"],
    ),
    "experts": (
        2,
        Qwen3MoeConfig(**shape(96, 4), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
        ["engine.precision=bf16", "engine.max_live=150000"],
    ),
    "two-passes": (
        4,
        Qwen3Config(**shape(128, 6)),
        [
            "refine.micro_batch_tokens=24",
            "engine.max_live=300000",
            "model.gradient_checkpointing=true",
            "align.rehearsal.weight=0.5",
            "align.rehearsal.batch_size=4",
        ],
    ),
}
COMMON = [
    "look.enabled=false", "checkpoint.every=null", "engine.persistence_threshold=200", "engine.reduce_bucket=40000",
    "engine.prefetch_bucket=20000", "refine.layer=3", "refine.batch_size=16", "align.batch_size=16",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_are_those_counted(tmp_path: Path, ranks: RankPool, case: str) -> None:
    world_size, model_config, own = CASES[case]
    source = save_checkpoint(tmp_path / "model", model_config)
    path, overrides = str(write_config(tmp_path, toy_settings(tmp_path, source))), [*COMMON, *own]
    per_rank = ranks.run(count_run, path, overrides, world_size=world_size, timeout=600.0)

    config = load_config(path, overrides)
    found = FoundModel(read_config(source, config.model), source, "saved here")
    planner = Planner(config, found, measure_lengths(config, source, Assumed()), on_gpu=False)
    plans = planner.plan(Cluster(world_size, 80 * GIB, DEVICES["h100"]))
    assert [plan.name for plan in plans] == ["refine", "align"]
    for plan, *counts in zip(plans, *per_rank, strict=True):
        compare(plan, counts, planner)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_whole_model_that_a_probe_keeps_is_planned(tmp_path: Path, ranks: RankPool, world_size: int) -> None:
    source = save_checkpoint(tmp_path / "model", LlamaConfig(**shape(128, 4)))
    path = str(write_config(tmp_path, toy_settings(tmp_path, source)))
    overrides = [*COMMON, "align=null", "probe={every: 50, pairs: 2, prompts: 2}"]
    counts = ranks.run(count_probed, path, overrides, world_size=world_size, timeout=600.0)

    config = load_config(path, overrides)
    found = FoundModel(read_config(source, config.model), source, "saved here")
    planner = Planner(config, found, measure_lengths(config, source, Assumed()), on_gpu=False)
    [plan] = planner.plan(Cluster(world_size, 80 * GIB, DEVICES["h100"]))
    assert [held for held, _ in counts] == [plan.memory.probe] * world_size
    assert plan.memory.probe == near(planner.whole * 4 / world_size)
    # Exporting reads what stage 1 has left alone; it is not loaded.
    assert sum(read for _, read in counts) == near(plan.disk.loaded)


def compare(plan: StagePlan, counts: list[dict[str, Any]], planner: Planner) -> None:
    """One stage's plan with what was counted on each rank."""
    element = planner.dtype.itemsize
    for count in counts:
        for part in ("parameters", "gradients", "optimizer"):
            assert count["held"][part] == near(getattr(plan.memory, part)), part
        buckets = count["held"]["buckets"] + count["reduced"] * element
        assert len(count["kept"]) == len(plan.work.packs)
        assert count["sent"] == near(plan.traffic.total)
        for kept, prefix, lengths, responses in count["kept"]:
            assert kept == near(activations(planner, plan.name, prefix, lengths, responses))
        # The largest bucket of a step is seldom full.
        assert 0.6 * plan.memory.buckets < buckets < 1.1 * plan.memory.buckets
        assert count["gathered"] == plan.gathers.peak
        assert count["gathers"] == plan.gathers.collectives
        # Held through the whole pass by what asked for it out of turn: peft its first factors, as the plan knows.
        assert all(".lora_A." in name for name in count["foreign"])
    # The plan is of the rank that has most to do.
    assert max(count["peak"] for count in counts) == near(plan.memory.total)
    total = {part: sum(count[part] for count in counts) for part in ("loaded", "copied", "exported")}
    assert total["loaded"] + total["copied"] == near(plan.disk.read)
    assert total["exported"] == near(plan.disk.exported)


def near(expected: float) -> Any:
    return pytest.approx(expected, rel=0.1)


def activations(planner: Planner, stage: str, prefix: int, lengths: tuple[int, ...], responses: int) -> int:
    """What is kept of a pack that a step really had; which of its prompts are retained matters to its loss alone."""
    shared: dict[str, Any] = {"prefix": prefix, "attention": planner.attention, "dtype": planner.dtype}
    model, config = planner.model.config, planner.config
    if stage == "refine":
        assert config.refine is not None
        return trunk_activations(model, config.refine, config.model, contrast=lengths, retained=(), **shared).kept
    assert config.align is not None
    return model_activations(
        model, config.align, config.model, examples=lengths, responses=responses, **shared
    ).kept  # fmt: skip
