"""The benchmark of both stages: it runs at a toy shape, counts what ran, and says which targets its figures reach."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("train_benchmark", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounds(benchmark, times_as_fast: dict[str, float]) -> list[dict]:
    """Two rounds on a machine that is twice as slow in the second."""
    found = []
    for speed in (100.0, 50.0):
        arms = {"stage 2": speed} | {arm: speed / ratio for arm, ratio in times_as_fast.items()}
        found.append({arm: {"tokens_per_second": v, "seconds": [1.0], "clock": "wall"} for arm, v in arms.items()})
    return found


@pytest.mark.parametrize(("better", "met"), [(1.01, True), (0.99, False)])
def test_targets_are_judged_by_ratios_within_a_round(benchmark, better, met):
    ratios = {arm: least * better for arm, least in benchmark.AT_LEAST.items()}
    tables = {method: benchmark.middle(rounds(benchmark, ratios)) for method in ("lora", "full")}
    tables["stage 1"] = {"stage 1": {"mfu": benchmark.MFU * better}}
    rows = benchmark.judge(tables, on_gpu=True)
    assert len(rows) == 2 * len(benchmark.TRL) + 1
    assert {row["met"] for row in rows} == {met}


def test_a_target_without_its_figure_is_not_met(benchmark):
    tables = {"lora": benchmark.middle(rounds(benchmark, {}))}
    assert {row["met"] for row in benchmark.judge(tables, on_gpu=False)} == {None}


@pytest.mark.slow
def test_stage_1_of_a_shape_runs_the_packs_that_were_asked_for(tmp_path):
    """Three packs a step, which nearly fill theirs: a pass without gradients comes on top of what MFU counts."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "train.py"), "--model-shape", "toy", "--layers", "2", "--rounds", "1"]
    command += ["--micro-tokens", "1024", "--micro-steps", "3", "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())["arms"]["stage 1"]["stage 1"]
    assert 0.95 * 3 * 1024 < found["tokens_per_step"] <= 3 * 1024
    # Two trained layers: forward 1, backward 2, and the first forward pass again.
    assert found["computed_share_of_gemm"] == pytest.approx(4 / 3 * found["mfu"], rel=0.01)
    assert found["peak_gib"] > 0
