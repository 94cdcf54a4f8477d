"""The probe's launcher: what it writes and says, on any number of ranks; input that it refuses."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.launcher.runner import parse_args as deepspeed_arguments
from rank_pool import RankPool
from safetensors import safe_open
from safetensors.torch import load_file
from toy import LAYERS, REPOSITORY, contrast_rows, launch_script, toy_checkpoint, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from dcr_scale.probe import KernelProbe
from dcr_scale.similarity.prompts import read_classes
from dcr_scale.similarity.settings import load_settings

SMALL = ["--rank", "4", "--groups", "2", "--output-probes", "3", "--seed", "1"]
PICTURES = ("heat_map.png", "distributions.png", "layers.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy") / "model")


def class_rows(label: str, count: int = 5) -> list[dict[str, str]]:
    """Every fifth matched pair's side, so that no two are of one family."""
    rows = [row for row in contrast_rows() if row["label"] == label]
    return [{key: row[key] for key in ("prompt", "pair")} for row in rows[:: len(rows) // count]][:count]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Flags that name both classes' files; the pairs stand in another order in the second."""
    a = write_jsonl(tmp_path / "harmless.jsonl", class_rows("seemingly_toxic"))
    b = write_jsonl(tmp_path / "harmful.jsonl", class_rows("toxic")[::-1])
    return ["--a", str(a), "--b", str(b)]


@pytest.fixture
def launched(alone: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the launcher in this process; returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
        return runpy.run_path(str(REPOSITORY / "launchers" / "probe.py"))["main"]()

    return run


def test_it_writes_what_the_probe_measures(tmp_path: Path, model: Path, files: list[str], launched: Callable) -> None:
    """Numbers equal to the library's on the same prompts, said again in the metadata, the summary and pictures."""
    out = tmp_path / "out"
    assert launched("--model", model, *files, *SMALL, "--out", out, "engine.precision=fp32") == 0

    tensors = load_file(out / "similarity.safetensors")
    with safe_open(out / "similarity.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    assert [row["class"] for row in prompts] == ["a"] * 5 + ["b"] * 5
    assert [row["pair"] for row in prompts[:5]] == [row["pair"] for row in prompts[5:]], "matched prompts in one order"
    probe = KernelProbe(
        AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model), 4, 2, 3, 1
    )
    expected = probe.measure([row["prompt"] for row in prompts])
    assert tensors["by_layer"].shape == (LAYERS, 10, 10)
    for name in ("squared", "stderr", "normalized", "by_layer", "self_squared", "deviations", "self_deviations"):
        torch.testing.assert_close(tensors[name], getattr(expected, name), rtol=1e-4, atol=1e-6, equal_nan=True)

    summary = json.loads((out / "summary.json").read_text())
    square = tensors["squared"] / tensors["self_squared"][:, None]
    assert summary["classes"] == {"a": "harmless", "b": "harmful"}
    assert summary["matched_pairs"] == 5
    apart = ~torch.eye(5, dtype=torch.bool)
    across = torch.cat([square[:5, 5:][apart], square[5:, :5][apart]]).mean().sqrt()
    within = square[:5, :5][apart].mean().sqrt()
    matched = torch.cat([square[:5, 5:].diagonal(), square[5:, :5].diagonal()]).mean().sqrt()
    for name, value in (("within_a", within), ("across", across), ("matched", matched)):
        found = summary["similarity"][name]
        assert found["value"] == pytest.approx(value.item(), rel=1e-6)
        assert found["interval"][0] < found["value"] < found["interval"][1]
        assert found["stderr"] == pytest.approx((found["stderr_prompts"] ** 2 + found["stderr_estimator"] ** 2) ** 0.5)
    for picture in PICTURES:
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_documented_command_runs_under_deepspeed(tmp_path: Path, model: Path, files: list[str]) -> None:
    """deepspeed reads a launcher's flags before the launcher does; the documented ones must pass it unchanged."""
    flags = ["--prompts-a", files[1], "--prompts-b", files[3], *SMALL, "--out", str(tmp_path / "out")]
    finished = launch_script("probe.py", "--model", str(model), *flags, ranks=1)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["world_size"] == 1


@pytest.mark.skipif(
    sys.version_info < (3, 12, 7) or sys.version_info[:3] == (3, 13, 0),
    reason="argparse complains of abbreviations behind the script",
)
def test_deepspeed_passes_the_short_flags_on() -> None:
    flags = ["--model", "PATH", "--a", "seemingly.jsonl", "--b", "toxic.jsonl", "--out", "DIR"]
    parsed = deepspeed_arguments(["launchers/probe.py", *flags])
    assert (parsed.user_script, parsed.user_args) == ("launchers/probe.py", flags)


def test_the_console_gets_the_averages_with_their_errors(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert launched("--model", model, *files, *SMALL, "--out", tmp_path / "out") == 0
    lines = capfd.readouterr().err.splitlines()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    titles = {"within_a": "within harmless", "across": "across, unmatched", "across_over_within": "across / within"}
    for name, title in titles.items():
        (line,) = [line for line in lines if line.startswith(title)]
        found = summary["similarity"][name]
        assert f"{found['value']:.3f}" in line
        assert f"{found['interval'][0]:.3f} … {found['interval'][1]:.3f}" in line
        assert str(found["pairs"]) in line


def test_an_exact_result_has_no_estimator_s_error(
    tmp_path: Path, model: Path, files: list[str], launched: Callable
) -> None:
    flags = ["--exact", "--limit", "2", "--parameters", r"layers\.[23]\..*norm"]
    assert launched("--model", model, *files, *flags, "--out", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["matched_pairs"] == 2
    for average in summary["similarity"].values():
        assert average["stderr_estimator"] == 0
    layers = summary["by_layer"]["across"]["mean"]
    assert layers[:2] == [0, 0] and min(layers[2:]) > 0


def test_built_in_prompts_are_drawn_by_whole_pairs() -> None:
    classes = read_classes(load_settings(["limit=6"]))
    assert classes.names == ("seemingly toxic", "toxic") and classes.sizes == (6, 6)
    assert classes.matched.sum() == 12
    other = read_classes(load_settings(["limit=6", "seed=1"]))
    assert {p.text for p in classes.prompts} != {p.text for p in other.prompts}


def test_a_limit_takes_matched_pairs_first(tmp_path: Path) -> None:
    single = [{"prompt": f"What is {word}?", "pair": ""} for word in ("bread", "snow", "wool")]
    a = write_jsonl(tmp_path / "a.jsonl", single + class_rows("seemingly_toxic", 3))
    b = write_jsonl(tmp_path / "b.jsonl", class_rows("toxic", 5))
    classes = read_classes(load_settings([f"a.path={a}", f"b.path={b}", "limit=4"]))
    assert classes.sizes == (4, 4)
    assert classes.matched.sum() == 6


def test_a_dry_run_reads_no_model(
    tmp_path: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    assert launched("--model", "no/such-model", *files, "--limit", "3", "--out", tmp_path / "out", "--dry-run") == 0
    said = capfd.readouterr().out
    assert "3 harmless and 3 harmful prompts (3 matched pairs)" in said
    assert "output_probes: 4" in said
    assert not (tmp_path / "out").exists()


def test_a_plan_needs_no_weights(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    """From config and tokenizer alone; more ranks hold less each, and too many for the prompts are refused."""
    for weights in shutil.copytree(model, tmp_path / "bare").glob("*.safetensors*"):
        weights.unlink()

    def held(ranks: int) -> str:
        assert launched("--model", tmp_path / "bare", *files, *SMALL, "--plan", ranks) == 0
        return next(line for line in capfd.readouterr().out.splitlines() if line.startswith("held a rank: weights"))

    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert held(1).split()[-2:] == [f"{2 * parameters / 1000:.3g}", "kB"]
    assert held(4).split()[-2:] == [f"{2 * parameters / 4000:.3g}", "kB"]
    assert launched("--model", tmp_path / "bare", *files, *SMALL, "--plan", 11) == 2
    assert "10 prompts are fewer than the 11 ranks" in capfd.readouterr().err


REFUSED = {
    "no such file": (["--a", "{folder}/harmles.jsonl"], "did you mean 'harmless.jsonl' there?"),
    "no such column": (["a.columns.prompt=promt"], "no column 'promt', which columns.prompt names"),
    "unknown key": (["a.colums.prompt=x"], "unknown key a.colums; did you mean a.columns?"),
    "one class twice": (["--b", "{folder}/harmless.jsonl"], "is in both classes"),
    "two of one pair": (["--b", "{folder}/twice.jsonl"], "pair 'pick 0' has two prompts of class b"),
    "too few": (["--a", "{folder}/one.jsonl"], "similarity within a class takes at least two"),
    "no number": (["--rank", "many"], "rank: expected a whole number, found 'many' (text)"),
    "too few probes": (["--output-probes", "2"], "output_probes: expected a whole number at least 3, found 2"),
    "odd rank": (["--rank", "3", "--groups", "1"], "must be even where groups is 1"),
    "limit of one": (["a.limit=3"], "a.limit: give limit"),
    "no such model": (["--model", "./nowhere"], "no such folder"),
    "no such parameter": (["--parameters", "[ab]xyz"], "parameters='[ab]xyz' finds no parameter"),
    "no folder": (["--out", "{folder}/one.jsonl/out"], "give another folder by --out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(
    case: str, tmp_path: Path, model: Path, files: list[str], launched: Callable, capfd: pytest.CaptureFixture
) -> None:
    write_jsonl(tmp_path / "one.jsonl", class_rows("seemingly_toxic", 1))
    write_jsonl(tmp_path / "twice.jsonl", [{"prompt": text, "pair": "pick 0"} for text in ("Why?", "How?")])
    arguments, reason = REFUSED[case]
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    assert launched("--model", model, *files, "--out", tmp_path / "out", *arguments) == 2
    stderr = capfd.readouterr().err
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert stderr.endswith(f"{line}\n"), "the reason is not the last thing said"
    assert "Traceback" not in stderr


def measured_on_ranks(overrides: list[str]) -> dict[str, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.similarity.command import measure

    config = load_settings(overrides)
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        # Not command.run, which would leave the process group that the next test borrows.
        return measure(config, engines.start(config.engine))


@pytest.mark.slow
def test_two_ranks_find_the_same_whole_and_partitioned(
    tmp_path: Path, model: Path, files: list[str], launched: Callable, ranks: RankPool
) -> None:
    assert launched("--model", model, *files, *SMALL, "--out", tmp_path / "alone") == 0
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    sides = [f"{side}.path={files[2 * i + 1]}" for i, side in enumerate("ab")]
    settings = [f"model.path={model}", *sides, "rank=4", "groups=2", "output_probes=3", "seed=1"]
    for partitioned in ("no", "yes"):
        out = tmp_path / partitioned
        overrides = [*settings, f"partitioned={partitioned}", f"out={out}", "engine.persistence_threshold=0"]
        summaries = ranks.run(measured_on_ranks, overrides, world_size=2, timeout=300.0)
        assert summaries[0]["similarity"] == summaries[1]["similarity"]
        assert summaries[0]["partitioned"] == (partitioned == "yes")
        assert summaries[0]["parameters"] == alone["parameters"]
        for name, average in alone["similarity"].items():
            assert summaries[0]["similarity"][name]["value"] == pytest.approx(average["value"], rel=1e-4)
            assert summaries[0]["similarity"][name]["stderr"] == pytest.approx(average["stderr"], rel=1e-3)
        first, second = (load_file(folder / "similarity.safetensors") for folder in (tmp_path / "alone", out))
        torch.testing.assert_close(second["normalized"], first["normalized"], rtol=1e-4, atol=1e-6, equal_nan=True)
