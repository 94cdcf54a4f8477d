"""The command: what it writes and says, what it refuses."""

from __future__ import annotations

import json
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from rank_pool import RankPool
from toy import REPOSITORY, contrast_rows, general_rows, launch_script, toy_checkpoint, toy_settings, write_jsonl
from transformers import AutoTokenizer

from dcr_scale import typed_yaml
from dcr_scale.config import load_config
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.evaluation.evaluate_prompts import held_out, read_suites
from dcr_scale.evaluation.evaluate_settings import load_settings
from dcr_scale.evaluation.identity import weights_digest
from dcr_scale.evaluation.intervals import wilson
from dcr_scale.evaluation.training_prompts import TrainedOn, training_prompts
from dcr_scale.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Flags that name a suite of two classes and categories, and held-out answers."""
    rows = [{**row, "category": row["family"]} for row in [*contrast_rows()][:8]]
    suite = write_jsonl(tmp_path / "mine.jsonl", rows)
    general = write_jsonl(tmp_path / "general.jsonl", [*general_rows()][:4])
    return ["--suite", str(suite), "--perplexity", str(general), "--max-new-tokens", "4"]


@pytest.fixture
def launched(alone: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the launcher in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        return runpy.run_path(str(REPOSITORY / "launchers" / "evaluate.py"))["main"]()

    return run


def test_the_summary_counts_what_the_completions_say(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert launched("--model", model, *files, "--out", out) == 0
    console = capfd.readouterr().err
    rows = [json.loads(line) for line in (out / "completions" / "mine.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    assert len(rows) == 8
    for of_class in ("seemingly_toxic", "toxic"):
        mine = [row for row in rows if row["class"] == of_class]
        found = summary["suites"]["mine"][of_class]
        refused = sum(row["refusal_probability"] >= 0.5 for row in mine)
        interval = wilson(refused, 4)
        assert found["prompts"] == len(mine) == 4
        assert found["refusal"] == {
            "count": refused,
            "estimate": refused / 4,
            "low": round(interval.low, 4),
            "high": round(interval.high, 4),
        }
        assert found["degenerate"]["count"] == sum(row["label"] == "degenerate" for row in mine)
        assert found["string_list_refusal"]["count"] == sum(row["opening_refuses"] for row in mine)
        counts = {name: sum(row["category"] == name for row in mine) for name in {row["category"] for row in mine}}
        assert {name: rates["prompts"] for name, rates in found["by_category"].items()} == counts
        title = f"mine, {of_class.replace('_', ' ')}"
        (line,) = [line for line in console.splitlines() if line.startswith(title)]
        assert line.removeprefix(title).split()[:2] == ["4", f"{refused / 4:.0%}"]
    assert set(summary["averages"]) == {"seemingly_toxic", "toxic"}
    assert summary["perplexity"]["examples"] == 4
    assert summary["perplexity"]["low"] < summary["perplexity"]["estimate"] < summary["perplexity"]["high"]
    assert summary["generated"]["prompts"] == 8
    assert summary["contamination"] is None and "give --run" in console
    assert {"torch", "transformers"} <= summary["versions"].keys() and summary["device"].startswith("CPU")

    assert launched("--model", model, *files, "--out", out, "--batch-size", "3") == 0
    assert "8 of 8 prompts were answered before" in capfd.readouterr().err
    assert launched("--model", model, *files, "--out", out, "--max-new-tokens", "5") == 2
    assert "another evaluation (max_new_tokens was 4 and is 5); give another folder by --out" in capfd.readouterr().err


def test_a_model_that_was_moved_is_the_same(
    tmp_path: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    folder, out = toy_checkpoint(tmp_path / "here"), tmp_path / "out"
    assert launched("--model", folder, *files, "--out", out) == 0
    moved = folder.rename(tmp_path / "there")
    assert launched("--model", moved, *files, "--out", out) == 0
    assert "8 of 8 prompts were answered before" in capfd.readouterr().err
    path = moved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
    assert launched("--model", moved, *files, "--out", out) == 2
    assert "another evaluation (configuration was" in capfd.readouterr().err


def test_what_a_run_trained_on_is_no_held_out_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another source beside the built-in instructions changes which of those the run holds out."""
    extra = write_jsonl(tmp_path / "extra.jsonl", general_rows())
    data = {"general": [{"path": "builtin"}, {"path": str(extra)}], "heldout_limit": 20}
    run = load_config(write_jsonl(tmp_path / "run.yaml", [{"data": data}]), [])
    settings = load_settings([])
    training = TrainedOn(run, training_prompts(run))
    trained = {text for texts in training.prompts.values() for text in texts}  # type: ignore[union-attr]
    assert trained & {prompt.text for prompt in held_out(settings, TrainedOn(run, None))}
    caplog.set_level("INFO")
    kept = held_out(settings, training)
    assert kept and not trained & {prompt.text for prompt in kept}
    assert "built-in held-out general answers were trained on: left out" in caplog.text
    everything = {"data.general": [prompt.text for prompt in held_out(settings)]}
    with pytest.raises(UserError, match="give others by --perplexity"):
        held_out(settings, TrainedOn(None, everything))


def test_prompts_that_a_suite_repeats_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*contrast_rows()][:4]
    suite = write_jsonl(tmp_path / "mine.jsonl", [*rows, rows[0]])
    caplog.set_level("INFO")
    assert len(read_suites(load_settings([f"suite=[{suite}]"]))["mine"]) == 5
    assert "mine: 1 of 5 prompts repeat another; each counts" in caplog.text


def test_a_run_s_training_prompts_are_found_in_the_suite(
    tmp_path: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    """The run is the folder above the model, as it leaves its checkpoints."""
    run = tmp_path / "run"
    folder = toy_checkpoint(run / "aligned")
    config = load_config(write_jsonl(tmp_path / "toy.yaml", [toy_settings(tmp_path, folder)]), [])
    (run / "config.yaml").write_text(typed_yaml.dump(typed_yaml.to_tree(config)), encoding="utf-8")
    assert launched("--model", folder, *files, "--out", tmp_path / "out") == 0
    warned = capfd.readouterr().err
    assert "contaminated: mine: 8 of 8 prompts were trained on (8 in data.contrast)" in warned
    by_name = {
        found["suite"]: found for found in json.loads((tmp_path / "out/summary.json").read_text())["contamination"]
    }
    assert by_name["mine"]["by_set"] == {"data.contrast": 8}
    assert by_name["perplexity"]["prompts"] == 4

    # Its sources have gone: a run that was asked for must be read, one that was merely found need not.
    (tmp_path / "data" / "contrast.jsonl").unlink()
    assert launched("--model", folder, *files, "--out", tmp_path / "out") == 0
    assert "training prompts are not looked for in the suites" in capfd.readouterr().err
    assert launched("--model", folder, *files, "--out", tmp_path / "out", "--run", run) == 2
    assert f"--run {run}: " in capfd.readouterr().err


def test_a_model_without_a_chat_template_is_asked_plainly(
    tmp_path: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    folder = toy_checkpoint(tmp_path / "base")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    assert launched("--model", folder, *files, "--out", tmp_path / "out") == 0
    assert "the tokenizer has no chat template: a prompt is its text and a blank line" in capfd.readouterr().err
    assert ChatEncoder(AutoTokenizer.from_pretrained(folder)).encode("Why?") == tokenizer("Why?\n\n").input_ids


def test_a_limit_is_drawn_by_class_and_grows(tmp_path: Path, files: list[str]) -> None:
    def drawn(*overrides: str) -> list[str]:
        settings = load_settings([f"suite=[{files[1]}]", *overrides])
        return [prompt.id for prompts in read_suites(settings).values() for prompt in prompts]

    two, three = drawn("limit=2"), drawn("limit=3")
    assert len(two) == 4 and len(three) == 6
    assert set(two) < set(three)
    assert three == sorted(three)
    assert drawn("limit=2", "seed=1") != two


def test_a_dry_run_asks_nothing(
    tmp_path: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert launched("--model", "/nowhere", *files, "--out", tmp_path / "out", "--dry-run") == 0
    said = capfd.readouterr().out
    assert "mine: 4 seemingly toxic, 4 toxic" in said
    assert "perplexity: 4 held-out general answers" in said
    assert not (tmp_path / "out").exists()


def test_training_further_changes_the_weights_digest(tmp_path: Path) -> None:
    folder = toy_checkpoint(tmp_path / "model")
    before = weights_digest(Checkpoint.open(folder))
    assert weights_digest(Checkpoint.open(toy_checkpoint(tmp_path / "other"))) == before
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    info = Checkpoint.open(folder).tensors["model.layers.2.mlp.up_proj.weight"]
    data[info.start + info.nbytes // 2] ^= 1
    path.write_bytes(data)
    assert weights_digest(Checkpoint.open(folder)) != before


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "no suite": (["--suite", "xtest"], "unknown suite 'xtest'; did you mean 'xstest'? known are xstest, coconot"),
    "missing column": (["--suite", "phtest={folder}/text.jsonl"], "no column 'Request' or 'prompt'"),
    "nothing left": (["--suite", "phtest={folder}/left.jsonl"], "none of its rows counts"),
    "twice": (["--suite", "{folder}/mine.jsonl"], "a suite named mine is there already"),
    "no run": (["--run", "{folder}"], "no config.yaml there; give a run's folder"),
    "no steering": (["--steering", "{folder}/none.safetensors"], "no such file"),
    "no answers": (["--perplexity", "{folder}/text.jsonl"], "text.jsonl: no"),
    "unknown task": (["--harness", "mmlu,chess"], "unknown task 'chess'; known are mmlu, arc, openbookqa, piqa"),
    "no harness": (["--harness", "arc"], "pip install -e '.[harness]'"),
    "no vllm": (["--engine", "vllm"], "pip install -e '.[vllm]'"),
    "another attention": (["model.attention=flash_attn"], "answers are made by torch's SDPA"),
    "steered harness": (["--harness", "piqa", "--steering", "x"], "cannot be combined with --steering"),
    "steered vllm": (["--engine", "vllm", "--steering", "x"], "cannot be combined with --steering"),
    "no folder": (["--out", "{folder}/text.jsonl/out"], "give another folder by --out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    case: str,
    tmp_path: Path,
    model: Path,
    files: list[str],
    launched: Callable,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_jsonl(tmp_path / "text.jsonl", [{"text": "Why?"}])
    write_jsonl(tmp_path / "left.jsonl", [{"Request": "Why?", "Harmfulness": "controversial"}])
    arguments, reason = REFUSED[case]
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    if case in ("no harness", "no vllm"):
        # Also where they are installed.
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert launched("--model", model, *files, "--out", tmp_path / "out", *arguments) == 2
    stderr = capfd.readouterr().err
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert "Traceback" not in stderr


def test_no_suite_at_all_lists_them(launched: Callable, capfd: pytest.CaptureFixture) -> None:
    assert launched("--model", "x") == 2
    assert "give at least one --suite: xstest, coconot" in capfd.readouterr().err


# --- other engines ----------------------------------------------------------------------------------------------


def test_vllm_s_answers_and_log_probabilities_are_taken_over(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shape of its published interface: it is not installed where there is no GPU."""

    class LLM:
        def __init__(self, **options: object) -> None:
            assert options["model"] == str(model)

        def generate(self, prompts: list[dict], sampling: SimpleNamespace, use_tqdm: bool) -> list[SimpleNamespace]:
            output = SimpleNamespace(
                text="I'm sorry, but I can't help with that.", token_ids=[5, 2], finish_reason="stop"
            )
            logprobs = [[{token: SimpleNamespace(logprob=-1.5)} for token in p["prompt_token_ids"]] for p in prompts]
            return [SimpleNamespace(outputs=[output], prompt_logprobs=row) for row in logprobs]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    fake.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    assert launched("--model", model, *files, "--out", tmp_path / "out", "--engine", "vllm") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["suites"]["mine"]["toxic"]["full_refusal"]["count"] == 4
    assert summary["perplexity"]["estimate"] == pytest.approx(2.718281828**1.5, rel=1e-4)
    assert summary["generated"]["tokens"] == 8


def test_the_task_harness_gets_the_model_and_its_own_names(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shape of its published interface: its data sets are on the Hub."""

    def simple_evaluate(model: SimpleNamespace, tasks: list[str], limit: int) -> dict:
        assert model.pretrained.config._attn_implementation == "sdpa", "packed attention takes no padded rows"
        return {"results": {task: {"alias": task, "acc,none": 0.25, "acc_stderr,none": 0.05} for task in tasks}}

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        fake = types.ModuleType(name)
        fake.simple_evaluate, fake.HFLM = simple_evaluate, SimpleNamespace  # type: ignore[attr-defined]
        fake.__spec__ = SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, fake)
    assert launched("--model", model, *files, "--out", tmp_path / "out", "--harness", "arc,piqa", "--limit", "2") == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]
    assert found == {
        task: {"acc,none": 0.25, "acc_stderr,none": 0.05} for task in ("arc_easy", "arc_challenge", "piqa")
    }


# --- ranks ------------------------------------------------------------------------------------------------------


def evaluated_on_ranks(overrides: list[str]) -> dict:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.evaluation.evaluate_command import Evaluation

    config = load_settings(overrides)
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        # Not run, which would leave the process group that the next test borrows.
        return Evaluation(config, engines.start(config.zero)).run()


@pytest.mark.slow
def test_ranks_and_partitions_find_the_same(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, ranks: RankPool
) -> None:
    assert launched("--model", model, *files, "--out", tmp_path / "alone") == 0
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    settings = [f"model.path={model}", f"suite=[{files[1]}]", f"perplexity.path={files[3]}", "max_new_tokens=4"]
    for partitioned in ("no", "yes"):
        overrides = [*settings, f"partitioned={partitioned}", f"out={tmp_path / partitioned}"]
        overrides += ["zero.persistence_threshold=0"]
        for summary in ranks.run(evaluated_on_ranks, overrides, world_size=2, timeout=300.0):
            assert summary["partitioned"] == (partitioned == "yes")
            assert summary["suites"] == alone["suites"]
            assert summary["perplexity"]["estimate"] == pytest.approx(alone["perplexity"]["estimate"], rel=1e-4)
        lines = [(tmp_path / name / "completions" / "mine.jsonl").read_bytes() for name in ("alone", partitioned)]
        assert lines[0] == lines[1]


@pytest.mark.slow
def test_the_documented_command_runs_under_deepspeed(tmp_path: Path, model: Path, files: list[str]) -> None:
    """deepspeed reads a launcher's flags before the launcher does."""
    finished = launch_script(
        "evaluate.py", "--model", str(model), *files, "--limit", "1", "--out", str(tmp_path / "out"), ranks=1
    )
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["world_size"] == 1
    assert summary["suites"]["mine"]["toxic"]["prompts"] == 1
