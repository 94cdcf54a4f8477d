"""Runs on ranks that do not see the same run folder, or not at the same time."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from interrupted import metrics, told_to_stop
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config


def run_on_ranks(
    config: str, folders: list[str], overrides: list[str], stop_at: int | None = None, blind: bool = False
) -> tuple[str, str]:
    """On each rank: a run in the folder that it has under the run's path; how it ended, and what was said or found.

    The last rank is told to stop at step ``stop_at`` of stage 1. One that is ``blind`` sees no state.json.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import load_config
    from dcr_scale.errors import Preempted, UserError
    from dcr_scale.models import phases
    from dcr_scale.pipeline import Run
    from dcr_scale.resume import checkpoints
    from dcr_scale.resume.stop import StopRequest

    rank, stop = int(os.environ["RANK"]), StopRequest()
    last = rank + 1 == len(folders)
    loaded = load_config(config, [f"run.dir={folders[rank]}", *overrides])
    told = told_to_stop("refine", stop_at) if stop_at is not None and last else nullcontext()
    unseen = mock.patch.object(checkpoints, "_read_state", lambda path: None) if blind and last else nullcontext()
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: False),
        mock.patch.object(phases, "_VISIBLE_SECONDS", 0.5),
        stop.listening(),
        told,
        unseen,
    ):
        world = engines.start(loaded.engine)
        try:
            return "finished", json.dumps(Run(loaded, world, stop).run())
        except (UserError, Preempted) as error:
            return type(error).__name__, str(error)


@pytest.fixture
def config(tmp_path: Path) -> str:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model"))
    return str(write_config(tmp_path, {**settings, "align": None, "look": {"prompts": 1, "max_new_tokens": 2}}))


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"disk_{rank}" / "run") for rank in range(2)]


def test_checkpoints_on_disks_of_their_own_are_refused_before_training(
    config: str, folders: list[str], ranks: RankPool
) -> None:
    (how, said), other = ranks.run(run_on_ranks, config, folders, ["checkpoint.every=1"], world_size=2)
    assert other == (how, said) and how == "UserError"
    assert "file system that all ranks share, or checkpoint.every=null" in said and "\n" not in said
    for folder in map(Path, folders):
        assert not (folder / "refined").exists() and not (folder / "checkpoints").exists()
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        assert (status["state"], status["reason"]) == ("failed", said)


def test_without_checkpoints_every_disk_gets_the_model(config: str, folders: list[str], ranks: RankPool) -> None:
    """A stop has nowhere to save to, and says so; what a finished run found is told on all ranks."""
    none = ["checkpoint.every=null"]
    stopped = ranks.run(run_on_ranks, config, folders, none, 2, world_size=2, timeout=300.0)
    assert stopped[0] == stopped[1] and stopped[0][0] == "Preempted"
    assert "nothing is saved of stage refine" in stopped[0][1]
    ended = ranks.run(run_on_ranks, config, folders, none, world_size=2, timeout=300.0)
    assert [how for how, _ in ended] == ["finished"] * 2
    first, second = (Path(folder) / "refined" / "model.safetensors" for folder in folders)
    assert first.read_bytes() == second.read_bytes()
    assert [row["step"] for row in metrics(Path(folders[0])) if row["stage"] == "refine"] == [1, 2, 3, 4]
    assert ranks.run(run_on_ranks, config, folders, none, world_size=2) == [ended[0]] * 2


def test_all_ranks_take_up_the_same_checkpoint(config: str, tmp_path: Path, ranks: RankPool) -> None:
    """Though a slow file system shows one of them nothing yet: the first rank's word counts."""
    shared, every = [str(tmp_path / "run")] * 2, ["checkpoint.every=1", "look.enabled=false"]
    stopped = ranks.run(run_on_ranks, config, shared, every, 2, world_size=2, timeout=300.0)
    assert [how for how, _ in stopped] == ["Preempted"] * 2
    ended = ranks.run(run_on_ranks, config, shared, every, None, True, world_size=2, timeout=300.0)
    assert [how for how, _ in ended] == ["finished"] * 2
