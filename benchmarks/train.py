"""Tokens a second, MFU and memory of both stages' steps, and stage 2 beside TRL's SFTTrainer.

    python benchmarks/train.py [key=value ...] [--ranks 1] [--rounds 2] [--steps 3] [--methods lora full] [--out FILE]
    python benchmarks/train.py --model-shape llama3_8b --layers 12 --micro-tokens 4096 --micro-steps 4 --steps 8

The first form takes configs/demo.yaml: SmolLM2-135M-Instruct and the built-in data. All arms of stage 2 train on the
same examples, with as many a step, under the same ZeRO-3 configuration, optimiser and adapters. The second is stage 1
alone, of random weights in a published shape. Every arm runs in fresh processes, the arms take turns, and each ratio is
the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fresh_ranks import run_on_ranks

STAGES = ("stage 1", "stage 2")
TRL = ("TRL unpacked", "TRL packed", "TRL packed, response rows")
# How many times TRL's tokens a second stage 2's must be.
AT_LEAST = {"TRL unpacked": 1.7, "TRL packed": 1.1, "TRL packed, response rows": 1.1}
# Of the GEMM rate, for stage 1 on a GPU.
MFU = 0.45


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each arm, behind two that warm up")
    parser.add_argument("--methods", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--arms", nargs="+", choices=(*STAGES, *TRL), default=[*STAGES, *TRL])
    parser.add_argument("--model-shape", choices=("llama3_8b", "toy"), help="stage 1 of random weights in this shape")
    parser.add_argument("--layers", type=int, default=12, help="of the trunk, with --model-shape")
    parser.add_argument("--micro-tokens", type=int, default=4096, help="of a pack, with --model-shape")
    parser.add_argument("--micro-steps", type=int, default=4, help="packs a step and rank, with --model-shape")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over configs/demo.yaml")
    return parser.parse_intermixed_args(arguments)


def rank_main(given: argparse.Namespace) -> None:
    """One rank of one arm: prints a JSON line on rank 0."""
    import train_arms

    from dcr_scale.config import load_config
    from dcr_scale.models.checkpoint import resolve

    root = Path(__file__).parents[1]
    if given.model_shape is None:
        # Answers of the model's own would have to be made first.
        plain = ["data.answered=[]", "align.answered_share=0"]
        config = load_config(root / "configs" / "demo.yaml", [*plain, *given.overrides])
        folder, contrast = resolve(config.model), None
    else:
        import train_shape

        config, folder = load_config(None, given.overrides), given.folder
        ranks = int(os.environ["WORLD_SIZE"])
        train_shape.settings(
            config, layers=given.layers, tokens=given.micro_tokens, packs=given.micro_steps, ranks=ranks
        )
        assert config.refine is not None
        contrast = train_shape.prompts(given.model_shape, config.refine.batch_size)
    found = train_arms.run_arm(given.arm, config, folder, given.steps, contrast)
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


def launch(given: argparse.Namespace, arm: str, options: list[str]) -> dict[str, Any]:
    """Run one arm on fresh ranks; on a CPU with one thread each, as ranks that fill its cores have."""
    threads = {"LOCAL_WORLD_SIZE": str(max(given.ranks, os.cpu_count() or 1)), "OMP_NUM_THREADS": "1"}
    return run_on_ranks(__file__, arm, ["--steps", str(given.steps), *options], given.ranks, threads)


def measure(given: argparse.Namespace, method: str | None, folder: Path | None) -> dict[str, dict[str, Any]]:
    """One round: every arm once, in turn. ``method`` is stage 2's; None: stage 1 alone."""
    options = list(given.overrides)
    if folder is not None:
        names = ("model_shape", "layers", "micro_tokens", "micro_steps")
        shape = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]
        options = [*shape, "--folder", str(folder), *options]
    if method is not None:
        options.append(f"align.method={method}")
    found = {}
    for arm in given.arms:
        if (arm == "stage 1") == (method is None):
            found[arm] = launch(given, arm, options)
            print(f"{method or ''} {arm}: {found[arm]['tokens_per_second']:.1f} tok/s", file=sys.stderr, flush=True)
    return found


def middle(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each arm's median of every figure, its rounds' seconds a step, and against each arm of TRL how many times as
    fast stage 2 is."""
    table: dict[str, dict[str, Any]] = {}
    for arm, first in rounds[0].items():
        seconds = [[round(s, 3) for s in each[arm]["seconds"]] for each in rounds]
        figures = {
            name: float(f"{statistics.median(each[arm][name] for each in rounds):.4g}")
            for name, value in first.items()
            if isinstance(value, float)
        }
        table[arm] = figures | {"clock": first["clock"], "seconds": seconds}
        if arm in TRL and "stage 2" in rounds[0]:
            ratios = [each["stage 2"]["tokens_per_second"] / each[arm]["tokens_per_second"] for each in rounds]
            table[arm]["stage_2_is_times_as_fast"] = round(statistics.median(ratios), 3)
            table[arm]["of_each_round"] = [round(ratio, 3) for ratio in ratios]
    return table


def judge(tables: dict[str, dict[str, dict[str, Any]]], on_gpu: bool) -> list[dict[str, Any]]:
    """The targets, what was measured, and whether they are met: None where there is no figure."""
    rows = []
    for method, table in tables.items():
        if method == "stage 1":
            if on_gpu:
                rows.append(_verdict("stage 1: share of the GEMM rate (MFU)", MFU, table["stage 1"].get("mfu")))
            continue
        for arm, least in AT_LEAST.items():
            ratio = table.get(arm, {}).get("stage_2_is_times_as_fast")
            rows.append(_verdict(f"stage 2, {method}: tokens/s against {arm}", least, ratio))
    return rows


def _verdict(target: str, least: float, measured: float | None) -> dict[str, Any]:
    met = None if measured is None else measured >= least
    return {"target": target, "at_least": least, "measured": measured, "met": met}


def main() -> None:
    given = parse()
    if given.arm:
        rank_main(given)
        return
    if given.model_shape is not None:
        given.arms = ["stage 1"]
    elif find_spec("trl") is None and set(given.arms) & set(TRL):
        print("trl is not installed and left out: pip install trl", file=sys.stderr)
        given.arms = [arm for arm in given.arms if arm not in TRL]

    import torch

    from dcr_scale.world import cpu_model

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as made:
        folder = None
        if given.model_shape is not None:
            import train_shape

            folder = Path(made)
            train_shape.write_model(folder, given.model_shape, given.layers)
        methods = [*([None] if "stage 1" in given.arms else []), *(given.methods if len(given.arms) > 1 else [])]
        rounds: dict[str | None, list] = {method: [] for method in methods}
        for _ in range(given.rounds):
            for method in methods:
                rounds[method].append(measure(given, method, folder))
    tables = {method or "stage 1": middle(each) for method, each in rounds.items()}
    names = ("torch", "deepspeed", "transformers", "peft", "accelerate", *(("trl",) if find_spec("trl") else ()))
    verdicts = judge(tables, on_gpu)
    result = {
        "benchmark": "train",
        "device": torch.cuda.get_device_name() if on_gpu else f"{cpu_model()}, one thread a rank",
        "ranks": given.ranks,
        "versions": {name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "model": given.model_shape or "configs/demo.yaml",
        **({"layers": given.layers, "micro_tokens": given.micro_tokens} if given.model_shape else {}),
        "overrides": given.overrides,
        "rounds": given.rounds,
        "targets": verdicts,
        "arms": tables,
    }
    text = json.dumps(result, indent=2)
    print(text)
    for row in verdicts:
        said = {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        print(f"{row['target']}: {row['measured']}, at least {row['at_least']}: {said}")
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
