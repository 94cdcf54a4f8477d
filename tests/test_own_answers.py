"""Seemingly toxic prompts that the model answers itself before it is trained, and what a run makes of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interrupted import outcome, told_to_stop
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config, write_jsonl

from dcr_scale import own_answers, pipeline
from dcr_scale.config import load_config
from dcr_scale.data.instructions import OWN
from dcr_scale.data.sources import read_rows
from dcr_scale.errors import Preempted, UserError
from dcr_scale.evaluation.training_prompts import training_prompts
from dcr_scale.run_data import describe, load_data
from dcr_scale.world import World

ASKED = 8
SETTINGS = [
    f"data.answered=[{{path: own, limit: {ASKED}}}]", "align.answered_share=0.25", "align.examples=16",
    "data.answer_tokens=8", "look.enabled=false", "checkpoint.every=1",
]  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    source = toy_checkpoint(tmp_path / "model", "llama")
    return str(write_config(tmp_path, toy_settings(tmp_path, source)))


def answers_to(count: int, calls: list[Sequence[str]]) -> Any:
    """In the place of a model that can be understood: it answers the first ``count`` prompts."""

    def answer(model: Any, encoder: Any, prompts: Sequence[str], **_: Any) -> list[dict[str, str]]:
        calls.append(prompts)
        return [{"prompt": prompt, "response": f"Like this: {prompt}"} for prompt in prompts[:count]]

    return mock.patch.object(own_answers, "own_answers", answer)


def test_prompts_are_seemingly_toxic_ones_that_are_trained_on(config: str) -> None:
    loaded = load_config(config, SETTINGS)
    data = load_data(loaded)
    assert len(data.asked) == ASKED and not any(one.response or one.refusal for one in data.asked)
    trained = {prompt.text for prompt in data.contrast.train if prompt.label == "seemingly_toxic"}
    assert {one.prompt for one in data.asked} < trained
    waiting = [one for one in data.mixture if not one.response]
    assert len(waiting) == 4 and set(waiting) < set(data.asked)
    assert training_prompts(loaded)["data.answered"] == [one.prompt for one in data.asked]
    text = describe(loaded)
    assert f"answers: the model's own to at most {ASKED} seemingly toxic prompts" in text
    assert "4 answered prompts)" in text and "no more" not in text
    assert "; of 5 refusals there are no more)" in describe(load_config(config, [*SETTINGS, "align.examples=null"]))


def test_prompts_that_a_file_answers_are_called_answered(config: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"How do I kill process {number}?", "response": "With kill."} for number in range(8)]
    path = write_jsonl(tmp_path / "answered.jsonl", rows)
    loaded = load_config(config, [f"data.answered=[{{path: {path}}}]", "align.answered_share=0.25", "refine=null"])
    found = training_prompts(loaded)
    assert set(found) == {"data.general", "data.refusals", "data.answered"}
    assert found["data.answered"] and set(found["data.answered"]) <= {row["prompt"] for row in rows}
    rehearsed = ["align.rehearsal={weight: 1, layer: 2}"]
    assert "data.contrast" in training_prompts(load_config(config, ["refine=null", *rehearsed]))


def test_general_instructions_of_stage_1_are_not_among_them(config: str) -> None:
    contrast = load_config(config, []).data.contrast[0].path
    mixed = f"data.contrast=[{{path: {json.dumps(contrast)}}}, {{path: general, label: seemingly_toxic}}]"
    data = load_data(load_config(config, [*SETTINGS, mixed]))
    assert len(data.asked) == ASKED
    assert not {one.prompt for one in data.asked} & {one.prompt for one in data.general.train}


def test_the_source_can_be_named_once(config: str) -> None:
    with pytest.raises(UserError, match="own is there twice"):
        load_data(load_config(config, [*SETTINGS, "data.answered=[{path: own}, {path: own}]"]))


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_it_is_asked(config: str, alone: None) -> None:
    loaded = load_config(config, [*SETTINGS, "align.max_tokens=48"])
    data = load_data(loaded)
    long = replace(data.asked[0], prompt=" ".join(["word"] * 60))
    with mock.patch.object(pipeline, "load_data", lambda _: replace(data, asked=[long])):
        with pytest.raises(UserError, match="word word"):
            pipeline.Run(loaded, World(0, 1, 0, 1, torch.device("cpu")))
        loaded.data.overlong = "drop"
        assert pipeline.Run(loaded, World(0, 1, 0, 1, torch.device("cpu"))).questions == []


def test_a_model_whose_attention_sdpa_cannot_compute_is_asked_all_the_same(tmp_path: Path, alone: None) -> None:
    settings = toy_settings(tmp_path, toy_checkpoint(tmp_path / "model", "gemma2"))
    loaded = load_config(str(write_config(tmp_path, settings)), SETTINGS)
    run = pipeline.Run(loaded, World(0, 1, 0, 1, torch.device("cpu")))
    answered, _ = own_answers.answered_by(run._open(run.source), run.questions, 4, run.encoder, loaded, run.world)
    assert {one.prompt for one in answered} <= {one.prompt for one in run.questions}


@pytest.mark.parametrize(
    ("wanted", "at_once"),
    [(1, [4]), (2, [8]), (3, [12, 8]), (5, [20]), (8, [20])],
)
def test_a_model_is_asked_until_it_has_given_enough_answers(
    config: str, alone: None, wanted: int, at_once: list[int]
) -> None:
    """Each time it answers the first two."""
    loaded, calls = load_config(config, SETTINGS), []
    run = pipeline.Run(loaded, World(0, 1, 0, 1, torch.device("cpu")))
    prompts = [replace(run.questions[0], prompt=f"How do I kill process {number}?") for number in range(20)]
    with answers_to(2, calls):
        found, asked = own_answers.answered_by(run._open(run.source), prompts, wanted, run.encoder, loaded, run.world)
    assert [len(call) for call in calls] == at_once and asked == sum(at_once)
    assert [prompt for call in calls for prompt in call] == [one.prompt for one in prompts[:asked]]
    assert len(found) == 2 * len(at_once) and all(one.response.endswith(one.prompt) for one in found)


@pytest.mark.slow
def test_a_run_asks_once_and_trains_on_the_answers(config: str, tmp_path: Path, alone: None) -> None:
    """Interrupted or not: the model that is asked is the one from before stage 1."""
    calls: list[Sequence[str]] = []
    with answers_to(6, calls):
        whole = pipeline.run(load_config(config, [*SETTINGS, f"run.dir={tmp_path / 'whole'}"]))
        for stage, step in (("refine", 2), ("align", 2)):
            with told_to_stop(stage, step), pytest.raises(Preempted):
                pipeline.run(load_config(config, [*SETTINGS, f"run.dir={tmp_path / 'cut'}"]))
        pipeline.run(load_config(config, [*SETTINGS, f"run.dir={tmp_path / 'cut'}"]))
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert len(calls) == 2, "once a run"
    assert whole["answers"] == {"asked": ASKED, "answered": 6}
    assert whole["align"]["examples"] == 16
    file = tmp_path / "whole" / "answered.jsonl"
    source = load_config(config, [*SETTINGS, f"data.answered=[{{path: {file}}}]"]).data.answered[0]
    assert [row.values["prompt"] for row in read_rows(source, kind="general")] == calls[0][:6]
    data = load_data(load_config(config, [*SETTINGS, f"data.answered=[{{path: {file}}}]"]))
    assert sum(one.response.startswith("Like this: ") for one in data.mixture) == 4, "another run can read them"


@pytest.mark.slow
def test_too_few_answers_end_the_run_before_it_trains(config: str, tmp_path: Path, alone: None) -> None:
    message = re.escape("answered 3 of 8 seemingly toxic prompts, and align.answered_share=0.25 wants 4")
    with answers_to(3, []), pytest.raises(UserError, match=message):
        pipeline.run(load_config(config, [*SETTINGS, f"run.dir={tmp_path / 'run'}"]))
    with answers_to(6, []):  # the same command asks again
        pipeline.run(load_config(config, [*SETTINGS, f"run.dir={tmp_path / 'run'}"]))
    assert (tmp_path / "run" / "aligned").exists()


def ask(config: str, partitioned: str) -> tuple[list[tuple[str, str]], int]:
    """On each rank: what the model answers where every answer counts as one, and modules that DeepSpeed holds more."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.zero import parameter_offload

    from dcr_scale import engine as engines
    from dcr_scale.evaluation import harness
    from dcr_scale.pipeline import Run

    judged = harness.judged

    def taken(*given: Any) -> Any:
        return replace(judged(*given), label="compliance", finished=True)

    loaded = load_config(config, [*SETTINGS, f"look.partitioned={partitioned}"])
    with mock.patch.object(torch.cuda, "is_available", lambda: False), mock.patch.object(harness, "judged", taken):
        run = Run(loaded, engines.start(loaded.engine))
        model = run._open(run.source)
        held = len(parameter_offload.FWD_MODULE_STACK)  # what earlier tests left on a borrowed rank
        found, _ = own_answers.answered_by(model, run.data.asked, ASKED, run.encoder, loaded, run.world)
    assert all(one.source == OWN for one in found)
    return [(one.prompt, one.response) for one in found], len(parameter_offload.FWD_MODULE_STACK) - held


@pytest.mark.slow
def test_ranks_share_the_asking(config: str, ranks: RankPool, alone: None) -> None:
    alone_found, _ = ask(config, "no")
    assert len(alone_found) == ASKED
    for partitioned in ("no", "yes"):
        for found, held in ranks.run(ask, config, partitioned, world_size=2, timeout=300.0):
            assert found == alone_found
            assert held == 0, "a model that was only asked is let go"
