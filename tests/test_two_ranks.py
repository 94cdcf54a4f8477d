"""Runs on ranks that tests lend out: what needs two of them, but not a launcher."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_pool import RankPool
from torch import nn
from toy import LAYERS, toy_checkpoint, toy_settings, write_config

from dcr_scale.models.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


def run_and_count(config: str, *overrides: str) -> tuple[list[int], dict[str, Any]]:
    """On each rank: a whole run; how often each attention module ran with gradients, in order of its first time, and
    the summary."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from transformers.models.llama.modeling_llama import LlamaAttention

    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.pipeline import Run

    runs: dict[nn.Module, int] = {}

    def count(module: nn.Module, _: object) -> None:
        if isinstance(module, LlamaAttention) and torch.is_grad_enabled():
            runs[module] = runs.get(module, 0) + 1

    loaded = load_config(config, list(overrides))
    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            # Not pipeline.run, which would leave the process group that the next test borrows.
            summary = Run(loaded, engines.start(loaded.engine)).run()
    finally:
        hook.remove()
    return list(runs.values()), summary


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_recomputed_layers_give_the_same_run(tmp_path: Path, ranks: RankPool) -> None:
    """Gradient checkpointing under ZeRO-3, all weights (stage 1) and LoRA (stage 2): each layer runs twice a step, on
    parameters gathered twice, and dropout falls as it did the first time."""
    source = toy_checkpoint(tmp_path / "model", "llama")
    config = str(write_config(tmp_path, toy_settings(tmp_path, source)))
    # No parameter is kept whole, so each must be gathered anew for the second time.
    overrides = ["engine.persistence_threshold=0", "look.enabled=false", "refine.steps=2"]
    overrides += ["align.method=lora", "align.lora.dropout=0.5", "align.examples=8"]
    counts: dict[bool, list[list[int]]] = {}
    for on in (False, True):
        own = [f"model.gradient_checkpointing={on}", f"run.dir={tmp_path / str(on)}"]
        results = ranks.run(run_and_count, config, *overrides, *own, world_size=2, timeout=300.0)
        counts[on] = [calls for calls, _ in results]
    for once, twice in zip(counts[False], counts[True], strict=True):
        assert len(once) == 2 + LAYERS and once[:2] == [2, 2], "a trunk of two layers, two steps; then the model"
        assert twice == [2 * calls for calls in once]
    for stage in ("refined", "aligned"):
        plain, recomputed = (tensors(tmp_path / str(on) / stage) for on in (False, True))
        for name, values in plain.items():
            assert torch.allclose(recomputed[name], values, atol=1e-6), f"{stage}: {name}"


def updates_of_a_run_whose_ranks_see_other_cosines(config: str, *overrides: str) -> int:
    """On each rank: stage 1's updates, where the second rank alone finds the classes apart."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale import refine
    from dcr_scale.config import load_config
    from dcr_scale.pipeline import Run

    cross = 0.9 if os.environ["RANK"] == "0" else 0.0
    separation = refine.separation
    loaded = load_config(config, list(overrides))
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(refine, "separation", lambda *given: replace(separation(*given), cross=cross)),
    ):
        return Run(loaded, engines.start(loaded.engine)).run()["refine"]["updates"]


def test_ranks_stop_stage_1_together_or_not_at_all(tmp_path: Path, ranks: RankPool) -> None:
    source = toy_checkpoint(tmp_path / "model", "llama")
    config = str(write_config(tmp_path, toy_settings(tmp_path, source)))
    overrides = ["refine.stop.cross_cosine=0.2", "refine.retention.weight=0", "align=null", "look.enabled=false"]
    updates = updates_of_a_run_whose_ranks_see_other_cosines
    assert ranks.run(updates, config, *overrides, world_size=2, timeout=120.0) == [4, 4]


def test_a_look_at_fewer_prompts_than_ranks_sees_what_one_rank_sees(
    tmp_path: Path, ranks: RankPool, alone: None
) -> None:
    source = toy_checkpoint(tmp_path / "model", "llama")
    config = str(write_config(tmp_path, toy_settings(tmp_path, source)))
    overrides = ["look.prompts=1", "refine.steps=1", "refine.retention.weight=0", "align=null"]
    _, summary = run_and_count(config, *overrides)
    expected = summary["look"]["before"]
    assert expected["prompts"] == {"seemingly_toxic": 1, "toxic": 1, "general": 1}
    # Not on one of the borrowed ranks: DeepSpeed numbers parameters, and the ranks' numbers must stay the same.
    for partitioned in ("no", "yes"):
        overrides.append(f"look.partitioned={partitioned}")
        for _, summary in ranks.run(run_and_count, config, *overrides, world_size=2, timeout=300.0):
            look = summary["look"]["before"]
            assert (look["refusal_rate"], look["prompts"]) == (expected["refusal_rate"], expected["prompts"])
            assert look["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
            assert look["cosine"] == pytest.approx(expected["cosine"], abs=1e-4)
