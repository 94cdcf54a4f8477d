"""The probe's passes against the passes alone, the exact Gram, and other packages that sketch gradients.

    python benchmarks/probe.py [--only speed memory scaling] [--models toy smollm2] [--rounds 9] [--out FILE]

Every arm takes the same scalar of every prompt, c·h with h the final hidden state and c one output probe taken back
through the head, and ends with the prompts' Gram matrix of its gradients. *plain* is what no arm can do without: the
forward pass and the backward pass to the embedding's output, every parameter frozen. *probe* counts every parameter;
*probe, linears* only those that the other packages sketch, against whose errors its own are set. Each round draws new
projections, outside the clock; the arms of a round take turns in one process.

Time is CPU time of one thread, the fastest of a few calls in a round: other processes disturb that least. Memory is
the growth of the resident peak over a loaded model, each arm in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from probe_arms import CASES, LINEARS, PEERS, RANK, TOKENS, Bench, Case, installed_peers
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dcr_scale.errors import UserError
from dcr_scale.models import smollm2
from dcr_scale.probe import KernelProbe
from dcr_scale.world import cpu_model

MEMORY_ARMS = ("plain", "probe", "bergson", "dattri")
LIMITS = {"time": 1.3, "memory": 1.15, "per doubling of R": 2.0, "per doubling of B": 1.1}
CALLS = 3
SLOW = ("exact loop", "ghost")


@dataclass
class Record:
    """An arm's rounds: CPU seconds, and the errors of its Gram matrix."""

    seconds: list[float] = field(default_factory=list)
    diagonal: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)

    def compare(self, estimate: Tensor, exact: Tensor) -> None:
        """Mean relative error of the diagonal, and root mean square error of the cosines off it."""
        mine, true = estimate.double().diagonal(), exact.double().diagonal()
        self.diagonal.append((mine / true - 1).abs().mean().item())
        apart = (estimate / torch.outer(mine, mine).sqrt() - exact / torch.outer(true, true).sqrt()).fill_diagonal_(0)
        self.cosine.append((apart.square().sum() / (len(mine) * (len(mine) - 1))).sqrt().item())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def measure_speed(case: Case, rounds: int) -> dict:
    bench = Bench(case)
    with bench.ghost(0) as call:
        exact = call()
    with bench.ghost(0, parameters=LINEARS) as call:
        exact_linears = call()
    records = {name: Record() for name in bench.arms()}

    def take(name: str, seed: int, calls: int) -> None:
        with bench.arms()[name](seed) as call:
            if calls > 1:
                call()  # draws the projections
            # The fastest of a few: what else the machine does can only add to a call.
            seconds, found = zip(*[timed(call) for _ in range(calls)], strict=True)
        records[name].seconds.append(min(seconds))
        if found[0] is not None:
            covers_all = name in ("probe", "probe, packed", "exact loop", "ghost")
            records[name].compare(found[0], exact if covers_all else exact_linears)

    # The slow ones apart: those that are compared stand next to each other in time, and take turns in being first.
    for name in SLOW:
        take(name, 0, 1)
    fast = [name for name in records if name not in SLOW]
    for seed in range(rounds):
        for name in fast[seed % len(fast) :] + fast[: seed % len(fast)]:
            take(name, seed, CALLS)
    table = {name: _summary(record, records["plain"], case.prompts) for name, record in records.items()}
    packed = _ratio(records["probe, packed"], records["plain, packed"])
    checks = [
        _check(f"{case.name}: probe / plain", table["probe"]["times_plain"], LIMITS["time"]),
        _check(f"{case.name}: probe / plain, both packed", packed["median"], LIMITS["time"]),
    ]
    for peer in installed_peers():
        for arm in ("probe, linears", "probe"):
            faster = _ratio(records[arm], records[peer])
            checks.append(_check(f"{case.name}: {arm} / {peer}", faster["median"], 1.0))
        for what in ("diagonal", "cosine"):
            # Both are drawn at random: larger means beyond two standard errors of the difference over the rounds.
            mine, theirs = getattr(records["probe, linears"], what), getattr(records[peer], what)
            limit = statistics.mean(theirs) + 2 * (_standard_error(mine) ** 2 + _standard_error(theirs) ** 2) ** 0.5
            checks.append(_check(f"{case.name}: {what} error, {peer}'s + 2 s.e.", statistics.mean(mine), limit))
    shape = {"prompts": case.prompts, "tokens": TOKENS, "rank": RANK, "groups": 1, "rounds": rounds}
    return {"shape": shape, "packed_times_plain_packed": packed, "arms": table, "checks": checks}


def _summary(record: Record, plain: Record, prompts: int) -> dict:
    each = [1e3 * seconds / prompts for seconds in record.seconds]
    ratio = _ratio(record, plain)
    summary = {
        "cpu_ms_per_prompt": round(statistics.median(each), 3),
        "min": round(min(each), 3),
        "max": round(max(each), 3),
        "times_plain": ratio["median"],
        "times_plain_quartiles": ratio["quartiles"],
    }
    if record.diagonal:
        summary |= {
            "diagonal_error": float(f"{statistics.mean(record.diagonal):.3g}"),
            "diagonal_error_se": float(f"{_standard_error(record.diagonal):.2g}"),
            "cosine_rmse": float(f"{statistics.mean(record.cosine):.3g}"),
            "cosine_rmse_se": float(f"{_standard_error(record.cosine):.2g}"),
        }
    return summary


def _ratio(mine: Record, other: Record) -> dict:
    """Round by round, as neighbours in time share what the machine does."""
    ratios = [a / b for a, b in zip(mine.seconds, other.seconds, strict=False)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "median": round(statistics.median(ratios), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
    }


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _check(what: str, value: float, limit: float) -> dict:
    return {
        "target": what,
        "measured": float(f"{value:.4g}"),
        "at_most": float(f"{limit:.4g}"),
        "holds": value <= limit,
    }


def measure_memory(name: str, rounds: int) -> dict:
    """MiB that an arm's set-up and first call add to the resident peak, projections drawn in them included."""
    arms = [arm for arm in MEMORY_ARMS if arm not in PEERS or arm in installed_peers()]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in arms:
            command = [sys.executable, __file__, "--models", name, "--peak-of", arm]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[arm].append(float(output.strip().splitlines()[-1]))
    growth = {arm: round(statistics.median(values), 1) for arm, values in found.items()}
    check = _check(f"{CASES[name].name}: peak memory / plain", growth["probe"] / growth["plain"], LIMITS["memory"])
    return {"growth_MiB": growth, "rounds": rounds, "checks": [check]}


def peak_of(case: Case, arm: str) -> float:
    first = Bench(replace(case, prompts=1))
    with getattr(first, arm)(0) as call:
        call()  # what libraries load and keep on first use
    bench = Bench(replace(case, build=lambda: first.model))
    gc.collect()
    # 5: the peak begins again at what is resident now (proc(5)).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    with getattr(bench, arm)(0) as call:
        call()
        return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def measure_scaling(case: Case, rounds: int) -> dict:
    """CPU time of ``KernelProbe.measure``, from prompts to estimates, by output probes and by groups."""
    bench = Bench(case)
    # Half the prompts: with R probes each is run R times.
    prompts = bench.prompts[: len(bench.prompts) // 2]
    settings = [("R", r, {"output_probes": r, "groups": 4}) for r in (2, 4, 8)]
    settings += [("B", b, {"output_probes": 2, "groups": b}) for b in (1, 2, 4, 8)]
    probes = {
        # Micro-batches of one size: a larger one costs a CPU more a token.
        (axis, n): KernelProbe(bench.model, rank=RANK, micro_batch_tokens=2 * len(prompts) * TOKENS, **options)
        for axis, n, options in settings
    }
    for probe in probes.values():
        probe.measure(prompts[:1])
    seconds: dict[tuple[str, int], Record] = {key: Record() for key in probes}
    for _ in range(rounds):
        for key, probe in probes.items():
            seconds[key].seconds.append(min(timed(lambda probe=probe: probe.measure(prompts))[0] for _ in range(2)))
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": TOKENS, "rank": RANK, "rounds": rounds, "checks": []}
    for axis, what in (("R", "output_probes"), ("B", "groups")):
        sizes = [n for key_axis, n in probes if key_axis == axis]
        result[f"{what}_cpu_seconds"] = {n: round(statistics.median(seconds[axis, n].seconds), 3) for n in sizes}
        for small, large in zip(sizes, sizes[1:], strict=False):
            ratio = _ratio(seconds[axis, large], seconds[axis, small])["median"]
            target = f"{case.name}: {what} {small} → {large}"
            result["checks"].append(_check(target, ratio, LIMITS[f"per doubling of {axis}"]))
    return result


def report(result: dict) -> None:
    for name, found in result["speed"].items():
        print(f"\n{CASES[name].name}: {found['shape']}")
        print(f"{'':16}{'CPU ms/prompt':>15}{'min':>9}{'max':>9}{'x plain':>9}{'diagonal':>18}{'cosine':>18}")
        for arm, row in found["arms"].items():
            errors = ""
            if "diagonal_error" in row:
                errors = f"{row['diagonal_error']:>10.2g} ± {row['diagonal_error_se']:<6.1g}"
                errors += f"{row['cosine_rmse']:>9.2g} ± {row['cosine_rmse_se']:<6.1g}"
            times = f"{row['cpu_ms_per_prompt']:>15.2f}{row['min']:>9.2f}{row['max']:>9.2f}{row['times_plain']:>9.2f}"
            print(f"{arm:16}{times}{errors}")
    for name, found in result["memory"].items():
        print(f"\n{CASES[name].name}: MiB over the loaded model: {found['growth_MiB']}")
    for name, found in result["scaling"].items():
        print(f"\n{CASES[name].name}: CPU seconds by R {found['output_probes_cpu_seconds']}, ", end="")
        print(f"by B {found['groups_cpu_seconds']}")
    print(f"\n{'target':56}{'measured':>10}{'at most':>10}")
    for part in ("speed", "memory", "scaling"):
        for found in result[part].values():
            for check in found["checks"]:
                verdict = "holds" if check["holds"] else "MISSED"
                print(f"{check['target']:56}{check['measured']:>10.4g}{check['at_most']:>10.4g}  {verdict}")
    for peer, command in PEERS.items():
        if peer not in installed_peers():
            print(f"{peer} is not installed and was left out: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("speed", "memory", "scaling"), metavar="PART")
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="of speed and scaling; memory takes 2")
    parser.add_argument("--out", type=Path, help="write the JSON that is printed there as well")
    parser.add_argument("--peak-of", choices=MEMORY_ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    if arguments.peak_of:
        print(peak_of(CASES[arguments.models[0]], arguments.peak_of))
        return

    models = list(arguments.models)
    if "smollm2" in models:
        try:
            smollm2.embedded_folder()
        except UserError as error:
            print(f"left out: {error}")
            models.remove("smollm2")
    parts = arguments.only or ("speed", "memory", "scaling")
    result = {
        "benchmark": "probe",
        "device": f"{cpu_model()}, {os.cpu_count()} cores, one thread",
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", *PEERS) if importlib.util.find_spec(name)
        },
        "python": platform.python_version(),
        "speed": {m: measure_speed(CASES[m], arguments.rounds) for m in models if "speed" in parts},
        "memory": {m: measure_memory(m, 2) for m in models if "memory" in parts},
        "scaling": {m: measure_scaling(CASES[m], arguments.rounds) for m in models if "scaling" in parts},
    }
    text = json.dumps(result, indent=2)
    print(text)
    report(result)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
