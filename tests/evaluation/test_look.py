"""A look at a checkpoint of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import toy_checkpoint, toy_settings, write_config

from dcr_scale.config import load_config
from dcr_scale.pipeline import Run
from dcr_scale.world import World


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_look_answers_and_scores_whatever_attention_the_model_has(tmp_path: Path, family: str, alone: None) -> None:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model", family))
    run = Run(load_config(str(write_config(tmp_path, settings)), []), World(0, 1, 0, 1, torch.device("cpu")))
    assert run.looker is not None
    found = run.looker.take("before", run._open(run.source))
    assert found.perplexity > 1.0
    answers = [json.loads(line) for line in (run.folder.path / "look" / "before.jsonl").read_text().splitlines()]
    assert len(answers) == len(run.looker.asked) > 0
