"""Fit an inference-time baseline: ``python launchers/steer.py --method surgical|scans --model PATH --out FILE``.

Writes FILE.safetensors, which the evaluation applies, and FILE.json, what it was chosen from. Runs in one process.
Exit codes: 0 done, 2 something to put right (one line says what).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dcr_scale.command_line import exit_code, leave
from dcr_scale.config import load_config
from dcr_scale.errors import UserError

# Which settings belong to which method, besides the KL limit of both.
_OWN = {"surgical": ("orthogonal", "positions"), "scans": ("alpha", "threshold")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", required=True, choices=sorted(_OWN))
    parser.add_argument("--model", required=True, help="local folder, Hub id, or smollm2-135m-instruct")
    parser.add_argument("--out", required=True, type=Path, help="file to write, without its ending")
    for name, part in (("seemingly", "data.contrast"), ("toxic", "data.contrast"), ("harmless", "data.general")):
        parser.add_argument(
            f"--{name}",
            metavar="FILE",
            help=f"prompts: .jsonl, .csv, .parquet or hub:owner/name (default: {part} of --config)",
        )
    parser.add_argument("--config", help="the training run's: what it held out is not used (default: built-in data)")
    parser.add_argument("--seed", type=int, help="the training run's (default: its configuration's)")
    parser.add_argument("--system-prompt", help="system message of every chat (default: the run's)")
    parser.add_argument("--kl-limit", type=float, default=0.2, help="on harmless prompts, in nats (default: 0.2)")
    parser.add_argument("--orthogonal", type=float, help="surgical: share of the true vector taken out (default: 1)")
    parser.add_argument("--positions", type=int, help="surgical: candidates from the end (default: the template's)")
    parser.add_argument("--alpha", type=float, help="scans: strength (default: chosen by validation; paper: 3.5)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="scans: cosine above which a prompt counts as toxic (default: chosen by validation; paper: .75)",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of a run, over the configuration's")
    return parser.parse_args()


def fit() -> None:
    given = parse_arguments()
    options = {"kl_limit": given.kl_limit}
    for method, names in _OWN.items():
        for name in names:
            value = getattr(given, name)
            if value is not None and method != given.method:
                raise UserError(f"--{name} is a setting of {method}, not of {given.method}; leave it out")
            if value is not None:
                options[name] = value
    config = load_config(given.config, given.settings)
    if given.system_prompt is not None:
        config.data.system_prompt = given.system_prompt
    # Only now: a typing error should not wait for heavy imports.
    from dcr_scale.baselines.command import run

    run(
        given.method,
        replace(config.model, path=given.model, revision=None),  # of another model it says nothing
        given.out,
        files={"seemingly_toxic": given.seemingly, "toxic": given.toxic, "harmless": given.harmless},
        data=config.data,
        seed=config.run.seed if given.seed is None else given.seed,
        options=options,
    )


def main() -> int:
    return exit_code(fit)


if __name__ == "__main__":
    leave(main())
