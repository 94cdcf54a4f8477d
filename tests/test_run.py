"""Both stages from end to end on toy checkpoints: what a run leaves behind, and why it stops."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from toy import LAYERS, REPOSITORY, launch, toy_checkpoint, toy_settings, write_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dcr_scale import engine as engines
from dcr_scale import pipeline
from dcr_scale.align import Aligner
from dcr_scale.config import Config, LogConfig, StopConfig, load_config
from dcr_scale.early_stop import EarlyStop
from dcr_scale.models.checkpoint import INDEX_FILE, Checkpoint
from dcr_scale.runlog import RunLog
from dcr_scale.world import World

STEP_FIELDS = {"stage", "step", "loss", "grad_norm", "lr", "tokens_per_second", "memory_gib"}
CLOCKS = {"tokens_per_second", "memory_gib"}


# --- what a run leaves ---------------------------------------------------------------------------------------------


def strict_json(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def read_metrics(run: Path) -> list[dict]:
    return [strict_json(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def bytes_of(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor on disk: dtype, shape, bytes."""
    checkpoint = Checkpoint.open(folder)
    return {
        name: (info.dtype, info.shape, checkpoint.read(name).view(torch.uint8).numpy().tobytes())
        for name, info in checkpoint.tensors.items()
    }


def layer_of(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def changed_tensors(before: Path, after: Path) -> set[str]:
    old, new = bytes_of(before), bytes_of(after)
    assert {name: value[:2] for name, value in old.items()} == {name: value[:2] for name, value in new.items()}
    return {name for name in old if old[name][2] != new[name][2]}


def check_complete(source: Path, exported: Path) -> None:
    """A checkpoint that loads without a remark, with all that lay beside the source's weights."""
    model, loading = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True, dtype="auto")
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert {path.name for path in exported.iterdir()} == {
        *(path.name for path in source.iterdir()), "README.md", "manifest.json"
    }  # fmt: skip
    chat = [{"role": "user", "content": "How do I kill a hung process?"}]
    assert AutoTokenizer.from_pretrained(exported).apply_chat_template(chat) == AutoTokenizer.from_pretrained(
        source
    ).apply_chat_template(chat)
    assert GenerationConfig.from_pretrained(exported).eos_token_id == 2
    card = (exported / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == source.name
    assert f"# toy: {source.name}, {exported.name}" in card


def check_refined(source: Path, exported: Path, layer: int) -> None:
    """The trunk's every layer has changed; tail, embedding and head are the source's to the byte."""
    check_complete(source, exported)
    changed = changed_tensors(source, exported)
    assert {layer_of(name) for name in changed} == set(range(layer))


def check_records(run: Path, looks: list[str], stages: dict[str, int]) -> dict:
    """metrics.jsonl and summary.json tell of the same looks and steps; returns the summary."""
    rows = read_metrics(run)
    for stage, steps in stages.items():
        own = [row for row in rows if row["stage"] == stage]
        assert [row["step"] for row in own] == list(range(1, steps + 1))
        extra = {"retention"} if stage == "refine" else set()
        assert all(row.keys() == STEP_FIELDS | extra for row in own)
        assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 and row["lr"] > 0 for row in own)
    if "refine" in stages:
        heldout = [row for row in rows if row["stage"] == "refine/heldout"]
        assert [row["step"] for row in heldout] == list(range(0, stages["refine"] + 1, 2))
        assert all(-1 <= row["cross"] <= 1 for row in heldout)
    summary = strict_json((run / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["look"]) == looks
    assert [row["model"] for row in rows if row["stage"] == "look"] == looks
    for name in looks:
        look = summary["look"][name]
        assert set(look["refusal_rate"]) == set(look["prompts"]) == {"seemingly_toxic", "toxic", "general"}
        assert look["perplexity"] > 1
        answers = [json.loads(line) for line in (run / "look" / f"{name}.jsonl").read_text().splitlines()]
        assert len(answers) == sum(look["prompts"].values())
    for stage, steps in stages.items():
        assert summary[stage]["updates"] == steps
    return summary


def run_here(config: Path, *overrides: str) -> Config:
    loaded = load_config(config, list(overrides))
    pipeline.run(loaded)
    return loaded


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict]:
    """A toy run of both stages on ``tmp_path/model``, which the test makes."""
    yield toy_settings(tmp_path, tmp_path / "model")


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_take_a_tied_bf16_llama_in_shards_through_both_stages(tmp_path: Path, settings: dict) -> None:
    """As a user starts it; the model spread over the ranks in the looks too, and LoRA in stage 2."""
    source = toy_checkpoint(tmp_path / "model", "llama", tied=True, sharded=True, dtype=torch.bfloat16)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    settings["look"]["partitioned"] = "yes"
    settings["align"]["method"] = "lora"
    # In bf16 a smaller step than half a unit in the last place would not be seen on disk.
    settings["refine"]["optimizer"]["lr"] = settings["align"]["optimizer"]["lr"] = 1e-2
    done = launch(write_config(tmp_path, settings))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr

    run, config = tmp_path / "run", tmp_path / "run" / "config.yaml"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "report.html", "look", "refined", "aligned",
        "progress.json", "status.json", "lock",
    }  # fmt: skip
    check_refined(source, run / "refined", layer=2)
    check_complete(source, run / "aligned")
    assert (run / "aligned" / INDEX_FILE).is_file()
    summary = check_records(run, ["before", "refined", "aligned"], {"refine": 4, "align": 5})
    assert (summary["world_size"], summary["refine"]["ended"]) == (2, "all 4 steps done")
    # Adapters are merged into the linear layers of every block, and into nothing else.
    changed = changed_tensors(run / "refined", run / "aligned")
    assert {layer_of(name) for name in changed} == set(range(LAYERS))
    assert all(name.endswith("_proj.weight") for name in changed)
    assert load_config(config, []) == load_config(tmp_path / "toy.yaml", [])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before, "the source was touched"
    # On the console: one line a step from one rank, and the table.
    assert len(re.findall(r"^refine +\d/4 ", done.stderr, re.MULTILINE)) == 4
    assert re.search(r"^held out, rates with 95 % intervals +before +refined +aligned$", done.stderr, re.MULTILINE)


def test_an_untied_qwen3_goes_through_both_stages(
    tmp_path: Path, settings: dict, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy_checkpoint(tmp_path / "model", "qwen3")
    settings["model"]["path"] = "model"
    monkeypatch.chdir(tmp_path)
    config = run_here(write_config(tmp_path, settings), "refine.optimizer.lr=3e-3")
    run = tmp_path / "run"
    check_refined(source, run / "refined", layer=2)
    check_complete(source, run / "aligned")
    # Full fine-tuning moves everything, embedding and head too.
    assert changed_tensors(run / "refined", run / "aligned") == bytes_of(source).keys()
    summary = check_records(run, ["before", "refined", "aligned"], {"refine": 4, "align": 5})
    assert summary["align"]["last_loss"] < summary["align"]["first_loss"]
    assert summary["refine"]["heldout_after"]["cross"] < summary["refine"]["heldout_before"]["cross"]
    # The configuration in the run's folder starts the same run from anywhere.
    config.model.path = str(source)
    assert load_config(run / "config.yaml", []) == config


@pytest.mark.slow
def test_a_mixture_of_experts_goes_through_both_stages(tmp_path: Path, settings: dict, alone: None) -> None:
    source = toy_checkpoint(tmp_path / "model", "qwen3-moe", sharded=True)
    overrides = ["refine.loss.name=supcon", "refine.pooling=mean", "refine.stop.cross_cosine=1.0"]
    run_here(write_config(tmp_path, settings), *overrides, "align.method=lora", "look.enabled=false")
    run = tmp_path / "run"
    check_refined(source, run / "refined", layer=2)
    check_complete(source, run / "aligned")
    summary = check_records(run, [], {"refine": 2, "align": 5})
    assert "reached its target of 1.0" in summary["refine"]["ended"]
    trained = changed_tensors(source, run / "refined")
    assert any(".experts." in name for name in trained) and any(".mlp.gate." in name for name in trained)
    adapted = changed_tensors(run / "refined", run / "aligned")
    assert {layer_of(name) for name in adapted} == set(range(LAYERS))


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_exported_is_what_was_trained(
    tmp_path: Path, settings: dict, alone: None, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """A tied head trains as one with the embedding: the export holds one tensor for both."""
    trained: dict[str, torch.Tensor] = {}
    close = Aligner.close

    def keeping(self: Aligner) -> None:
        with engines.whole(self.model.parameters()):
            trained.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        close(self)

    monkeypatch.setattr(Aligner, "close", keeping)
    toy_checkpoint(tmp_path / "model", "llama", tied=tied)
    run_here(write_config(tmp_path, settings), "refine=null", "look.enabled=false")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "aligned").state_dict()
    assert exported.keys() == trained.keys() and "lm_head.weight" in exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[name]), name
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"]) == tied


def test_without_stage_1_it_is_plain_safety_tuning(tmp_path: Path, settings: dict, alone: None) -> None:
    source = toy_checkpoint(tmp_path / "model", "llama")
    run_here(write_config(tmp_path, settings), "refine=null")
    run = tmp_path / "run"
    assert not (run / "refined").exists()
    check_complete(source, run / "aligned")
    summary = check_records(run, ["before", "aligned"], {"align": 5})
    assert "refine" not in summary
    assert "without refinement (STL)" in (run / "aligned" / "README.md").read_text(encoding="utf-8")


def test_the_same_seed_gives_the_same_run_wherever_retained_activations_lie(
    tmp_path: Path, settings: dict, alone: None
) -> None:
    """Stage 1 alone, twice: in memory and spilled to disk; a third time with another seed."""
    toy_checkpoint(tmp_path / "model", "llama")
    config = write_config(tmp_path, settings)
    metrics, weights = [], []
    for number, override in enumerate(["run.seed=0", "refine.retention.memory_gib=0", "run.seed=1"]):
        run = tmp_path / f"run_{number}"
        run_here(config, "align=null", "look.prompts=2", f"run.dir={run}", override)
        names = {path.name for path in run.iterdir()}
        kept = {"config.yaml", "metrics.jsonl", "summary.json", "report.html", "look", "refined"}
        assert names == kept | {"progress.json", "status.json", "lock"}
        metrics.append([{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(run)])
        weights.append(bytes_of(run / "refined"))
    assert metrics[0] == metrics[1]
    assert weights[0] == weights[1]
    assert metrics[0] != metrics[2]


@pytest.mark.parametrize("refine", ["refine.layer=2", "refine=null"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(
    tmp_path: Path, settings: dict, refine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(tmp_path, settings)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dcr.py", "--config", str(config), "--dry-run", refine])
    assert runpy.run_path(str(REPOSITORY / "launchers" / "dcr.py"))["main"]() == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    # The plan follows the configuration, which can be pasted into a file as it is.
    resolved, plan = printed.split("\nmodel: ")
    (tmp_path / "pasted.yaml").write_text(resolved, encoding="utf-8")
    assert load_config(tmp_path / "pasted.yaml", []) == load_config(config, [refine])
    assert ("stage 1: the first 2 layers, supcon loss, at most 4 steps of 8 prompts" in plan) is (refine[6] == ".")
    counts = r"\d+ general instructions, \d+ refusals, \d+ answered prompts"
    assert re.search(rf"stage 2: full, 1 epochs of \d+ examples \({counts}.*\), 4 a step", plan)


def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    toy_checkpoint(tmp_path / "model", "llama")
    config = write_config(tmp_path, settings)
    monkeypatch.setattr(sys, "argv", ["dcr.py", "--config", str(config), "--dry-run", "refine.layer=40"])
    assert runpy.run_path(str(REPOSITORY / "launchers" / "dcr.py"))["main"]() == 2
    assert "refine.layer=40" in capsys.readouterr().err


def test_metrics_hold_every_step_and_the_console_some(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runlog = RunLog(LogConfig(every=3), tmp_path, "toy", {}, World(0, 1, 0, 1, torch.device("cpu")))
    runlog.start()
    with caplog.at_level("INFO", logger="dcr_scale"):
        for step in range(1, 8):
            runlog.step("refine", step, 7, tokens=10, device_memory=0.0, loss=1.0 / step)
    runlog.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["loss"] for row in rows] == [1.0 / step for step in range(1, 8)]
    assert [record.args[1] for record in caplog.records] == [3, 6, 7]


def test_a_dry_run_of_a_checkpoint_says_what_it_takes(
    tmp_path: Path, settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source = toy_checkpoint(tmp_path / "model", "llama")
    config = write_config(tmp_path, settings)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["dcr.py", "--config", str(config), "--dry-run", "--gpus", "2"])
    assert runpy.run_path(str(REPOSITORY / "launchers" / "dcr.py"))["main"]() == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "no plan:" not in printed
    table = printed.split("\nlooks: ")[1]
    rows = {row[:27].strip(): re.split(r"\s{2,}", row[27:].strip()) for row in table.splitlines() if row[27:].strip()}
    assert ["stage 1 (refine)", "stage 2 (align)"] in rows.values()
    # Stage 1 has the first two layers and trains them but for the embedding; stage 2 has and trains everything.
    sizes = {name: math.prod(info.shape) for name, info in Checkpoint.open(source).tensors.items()}
    trunk = sum(size for name, size in sizes.items() if layer_of(name) in (0, 1))
    embedding = sizes["model.embed_tokens.weight"]
    whole = sum(sizes.values())
    assert rows["parameters, of them trained"] == [
        f"{(trunk + embedding) / 1e9:.3g} B, {trunk / 1e9:.3g} B", f"{whole / 1e9:.3g} B, {whole / 1e9:.3g} B"
    ]  # fmt: skip
    assert rows["layers that run"] == ["2", str(LAYERS)]
    assert rows["steps, at most"] == ["4", "5"]
    assert rows["fits 80 GiB"] == ["yes", "yes"]
    # Two GPUs have something to say to one another.
    assert re.search(r"^sent by a rank a step *\n  parameters +[1-9].* [kM]?B +[1-9].* [kM]?B$", table, re.MULTILINE)
    assert "time on 2 × H100" in table


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    """A skipped step has no gradient norm; JSON has no nan, and strict readers stop at one."""
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    runlog = RunLog(LogConfig(), tmp_path, "toy", {}, world)
    runlog.step("refine", 1, 2, tokens=10, device_memory=0.5, loss=math.inf, grad_norm=math.nan, lr=1e-3)
    runlog.record("look", 0, {"model": "before", "cosine": {"matched": math.nan}, "perplexity": 3.0})
    runlog.close()
    step, look = read_metrics(tmp_path)
    assert (step["loss"], step["grad_norm"], step["lr"]) == (None, None, 1e-3)
    assert (look["cosine"], look["perplexity"]) == ({"matched": None}, 3.0)


# --- early stopping ------------------------------------------------------------------------------------------------


def test_stage_1_stops_when_the_classes_lie_apart() -> None:
    stop = EarlyStop(StopConfig(cross_cosine=0.2, patience=2))
    assert stop.reason(0.21) is None
    assert stop.reason(0.2) == "held-out cross-class cosine 0.200 reached its target of 0.2"


def test_stage_1_stops_at_a_plateau_measured_from_the_best_look() -> None:
    stop = EarlyStop(StopConfig(cross_cosine=None, patience=2, min_delta=0.05))
    # One look without progress is forgiven by a fall; then a rise, and a fall that is too small.
    assert [stop.reason(cosine) for cosine in (0.9, 0.8, 0.85, 0.7, 0.72)] == [None] * 5
    reason = str(stop.reason(0.66))
    assert reason.startswith("plateau") and "has not fallen by 0.05 in 2 looks (now 0.660)" in reason


def test_patience_zero_never_stops() -> None:
    stop = EarlyStop(StopConfig(cross_cosine=None, patience=0))
    assert [stop.reason(0.5) for _ in range(20)] == [None] * 20
