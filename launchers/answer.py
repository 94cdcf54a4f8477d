"""Write a model's own answers to seemingly toxic prompts, for stage 2: ``python launchers/answer.py --out FILE``.

FILE becomes JSONL with the columns prompt and response; refusals are left out. Name it under data.answered. Runs in one
process. Exit codes: 0 done, 2 something to put right (one line says what).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from dcr_scale.command_line import exit_code, leave
from dcr_scale.config import load_config


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--model", help="folder or Hub id (default: the configuration's model)")
    parser.add_argument("--prompts", metavar="FILE", help="seemingly toxic ones (default: those the run trains on)")
    parser.add_argument("--config", help="the training run's: what it holds out is not asked (default: built-in data)")
    parser.add_argument("--seed", type=int, help="the training run's (default: its configuration's)")
    parser.add_argument("--limit", type=int, default=200, help="prompts asked at most (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, help="maximum tokens of an answer (default: data.answer_tokens)")
    parser.add_argument("--system-prompt", help="system message of every chat (default: the run's)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of a run, over the configuration's")
    return parser.parse_args()


def answer() -> None:
    given = parse_arguments()
    config = load_config(given.config, given.settings)
    if given.model is not None:  # the configuration's revision says nothing of another model
        config.model = replace(config.model, path=given.model, revision=None)
    if given.system_prompt is not None:
        config.data.system_prompt = given.system_prompt
    # Only now: a typing error should not wait for heavy imports.
    from dcr_scale.baselines.command import write_answers

    write_answers(
        config.model,
        given.out,
        file=given.prompts,
        data=config.data,
        seed=config.run.seed if given.seed is None else given.seed,
        limit=given.limit,
        max_new_tokens=given.max_new_tokens or config.data.answer_tokens,
    )


def main() -> int:
    return exit_code(answer)


if __name__ == "__main__":
    leave(main())
