"""A run that goes on with another number of ranks trains the same model."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from interrupted import metrics, told_to_stop
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config

pytestmark = pytest.mark.slow


def part_of_run(config: str, overrides: list[str], stop_at: tuple[str, int] | None) -> bool:
    """On each rank: a run up to where it is told to stop (on its last rank), or to its end; whether it stopped."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.errors import Preempted
    from dcr_scale.pipeline import Run
    from dcr_scale.resume.stop import StopRequest

    loaded, stop = load_config(config, overrides), StopRequest()
    with mock.patch.object(torch.cuda, "is_available", lambda: False), stop.listening():
        world = engines.start(loaded.engine)
        try:
            if stop_at is None or world.rank + 1 < world.size:
                Run(loaded, world, stop).run()
            else:
                with told_to_stop(*stop_at):
                    Run(loaded, world, stop).run()
        except Preempted:
            return True
    return False


@pytest.mark.parametrize(("stage", "method"), [("refine", "full"), ("align", "full"), ("align", "lora")])
def test_two_ranks_then_four_then_one(tmp_path: Path, ranks: RankPool, stage: str, method: str) -> None:
    """20 steps: 7 on two ranks, 7 on four, the rest on one. In stage 1 the layers above are frozen, and so is all but
    the adapters in stage 2 with LoRA, which rehearses. Whichever rank the signal strikes, all stop."""
    source = toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, source)
    settings["refine"] |= {"steps": 20, "stop": {"every": 50}}
    settings["align"] |= {"method": method, "lora": {"dropout": 0}, "epochs": 4.4}
    if method == "lora":
        settings["align"] |= {"rehearsal": {"weight": 0.5, "batch_size": 4, "layer": 2}, "micro_batch_tokens": 256}
    config = str(write_config(tmp_path, settings))
    overrides = ["look.enabled=false", f"{'align' if stage == 'refine' else 'refine'}=null"]
    cut, whole = [*overrides, f"run.dir={tmp_path / 'cut'}"], [*overrides, f"run.dir={tmp_path / 'whole'}"]
    for size, stop_at in ((2, (stage, 7)), (4, (stage, 14)), (1, None)):
        stopped = ranks.run(part_of_run, config, cut, stop_at, world_size=size, timeout=300.0)
        assert stopped == [stop_at is not None] * size
    ranks.run(part_of_run, config, whole, None, world_size=2, timeout=300.0)
    found, expected = (
        [row["loss"] for row in metrics(tmp_path / name) if row["stage"] == stage] for name in ("cut", "whole")
    )
    assert len(expected) == 20
    assert found == pytest.approx(expected, rel=1e-4)
