"""Stage 1 in two passes over several packs: the gradients of one pass over all."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config

from dcr_scale.config import load_config
from dcr_scale.models.checkpoint import Checkpoint


def trained(config: str, overrides: list[str]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """On each rank: the exported tensors of stage 1, and how many packs each step took."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.contrast_packs import ContrastPacks
    from dcr_scale.pipeline import Run

    counts: list[int] = []
    of_step = ContrastPacks.of_step

    def counted(self: ContrastPacks, step: int) -> list:
        packs = of_step(self, step)
        counts.append(len(packs))
        return packs

    loaded = load_config(config, overrides)
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(ContrastPacks, "of_step", counted),
    ):
        Run(loaded, engines.start(loaded.engine)).run()
    return tensors(loaded.run.folder / "refined"), counts


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["circle", "supcon"])
@pytest.mark.parametrize("size", [1, 2])
def test_two_passes_train_what_one_pass_trains(tmp_path: Path, ranks: RankPool, size: int, loss: str) -> None:
    """With retained prompts among the packs, mean pooling, recomputed layers, and parameters that are gathered anew."""
    source = toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, source)
    settings["refine"] |= {"pooling": "mean", "loss": {"name": loss}}
    config = str(write_config(tmp_path, settings))
    overrides = ["look.enabled=false", "align=null", "refine.optimizer.eps=1e-3", "engine.persistence_threshold=0"]
    results = {}
    for name, own in {
        "one": [],
        "two": ["refine.micro_batch_tokens=24"],
        "recomputed": ["refine.micro_batch_tokens=24", "model.gradient_checkpointing=true"],
    }.items():
        given = [*overrides, *own, f"run.dir={tmp_path / name}"]
        results[name] = ranks.run(trained, config, given, world_size=size, timeout=300.0)
    one, counts = results["one"][0]
    assert set(counts) == {1}
    untouched = tensors(source)
    for name in ("two", "recomputed"):
        per_rank = [counts for _, counts in results[name]]
        assert all(count > 1 for count in per_rank[0]) and per_rank == [per_rank[0]] * size
        for key, value in results[name][0][0].items():
            moved = (one[key] - untouched[key]).abs().max()
            # AdamW divides by the gradient's own size; eps keeps rounding from deciding signs.
            assert (value - one[key]).abs().max() <= 1e-3 * moved + 1e-7, f"{name}: {key}"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}
