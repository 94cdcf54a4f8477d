"""The same command, again: a run that was interrupted ends as if it had not been."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from interrupted import outcome, told_to_stop
from toy import toy_checkpoint, toy_settings, write_config

from dcr_scale import pipeline
from dcr_scale.config import load_config
from dcr_scale.errors import Preempted, UserError
from dcr_scale.resume import checkpoints

LORA = ["align.method=lora", "align.lora.dropout=0.3"]
# Where a run can be told to stop: in the middle of a stage, in the step before its end, between the parts.
MOMENTS = {
    "in stage 1": ("refine", 2),
    "at stage 1's last step": ("refine", 4),
    "in stage 2": ("align", 3),
    "in the last look": ("look", 2),
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, tmp_path / "model")
    settings["probe"] = {"every": 2, "pairs": 2, "prompts": 2, "rank": 2, "groups": 2, "output_probes": 2}
    settings["checkpoint"] = {"every": 1}
    return write_config(tmp_path, settings)


def begin(config: Path, folder: Path, *overrides: str, **told: bool) -> dict:
    return pipeline.run(load_config(config, [f"run.dir={folder}", *overrides]), **told)


def interrupt(config: Path, folder: Path, stage: str, step: int, *overrides: str, number: int = signal.SIGUSR1) -> str:
    with told_to_stop(stage, step, number), pytest.raises(Preempted) as stopped:
        begin(config, folder, *overrides)
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["reason"]) == ("preempted", str(stopped.value))
    return str(stopped.value)


@pytest.mark.parametrize("overrides", [[], LORA], ids=["full", "lora"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    config: Path, tmp_path: Path, overrides: list[str], alone: None
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    begin(config, whole, *overrides)
    for stage, step in MOMENTS.values():
        interrupt(config, cut, stage, step, *overrides)
    begin(config, cut, *overrides)
    assert outcome(cut) == outcome(whole)
    assert not (cut / "checkpoints").exists(), "what is done needs no checkpoint"
    assert json.loads((cut / "status.json").read_text(encoding="utf-8"))["state"] == "finished"
