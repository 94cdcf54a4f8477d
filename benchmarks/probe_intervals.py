"""How often the probe's intervals of single squares hold the truth, on models whose exact kernel is at hand.

    python benchmarks/probe_intervals.py [--models toy] [--seeds 100] [--out FILE]

Every pair of a few short prompts is measured once exactly and then, for each number R of output probes, under many
seeds. Printed are the share of 95 % intervals that hold the exact ‖K‖²_F, over all pairs and for the pair of which the
fewest do, and how wide the intervals are: the medians of their ends by the exact value. SmolLM2's exact kernel of even
these prompts is for a machine with more than 24 GiB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from probe_arms import CASES
from transformers import AutoTokenizer, PreTrainedModel

from dcr_scale.models import smollm2
from dcr_scale.probe import KernelProbe
from dcr_scale.world import device_name, versions

TEXTS = ("Kill time.", "Say hello.", "Why not?")
PROBES = (2, 3, 4, 8)


def prompts_for(model: PreTrainedModel) -> list[list[int]]:
    """The texts' tokens by SmolLM2's tokenizer; in a smaller vocabulary, as many others that stand for them."""
    ids = AutoTokenizer.from_pretrained(smollm2.embedded_folder())(list(TEXTS)).input_ids
    return [[token % model.config.vocab_size for token in row] for row in ids]


def coverage(model: PreTrainedModel, prompts: list[list[int]], exact: torch.Tensor, probes: int, seeds: int) -> dict:
    """What intervals of ``seeds`` measurements hold: shares, and ends by the exact value."""
    rows, columns = torch.triu_indices(len(prompts), len(prompts))
    lows, highs = [], []
    for seed in range(seeds):
        low, high = KernelProbe(model, output_probes=probes, seed=seed).measure(prompts).interval(0.95)
        lows.append((low / exact)[rows, columns])
        highs.append((high / exact)[rows, columns])
    low_SP, high_SP = torch.stack(lows), torch.stack(highs)
    held_P = ((low_SP <= 1) & (high_SP >= 1)).double().mean(dim=0)
    return {
        "held": round(float(held_P.mean()), 4),
        "held_of_the_worst_pair": round(float(held_P.min()), 4),
        "median_low": round(float(low_SP.median()), 4),
        "median_high": round(float(high_SP.median()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=["toy"])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/probe_intervals.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"device": device_name(torch.device("cpu")), **versions(), "seeds": given.seeds}
    for name in given.models:
        model = CASES[name].build().eval()
        prompts = prompts_for(model)
        measured = KernelProbe(model).measure(prompts, exact=True)
        known = KernelProbe(model, output_probes=2).measure(prompts).known / measured.squared
        found[name] = {"prompt_tokens": [len(row) for row in prompts], "median_known_share": float(known.median())}
        print(
            f"{CASES[name].name}: the head's own part is {float(known.median()):.2g} of a square (median)", flush=True
        )
        for probes in PROBES:
            row = coverage(model, prompts, measured.squared, probes, given.seeds)
            found[name][f"R={probes}"] = row
            print(
                f"  R = {probes}: {row['held']:.2f} of the intervals hold the square, of the worst pair "
                f"{row['held_of_the_worst_pair']:.2f}; they reach from {row['median_low']:.2g} to "
                f"{row['median_high']:.3g} of it (medians)",
                flush=True,
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
