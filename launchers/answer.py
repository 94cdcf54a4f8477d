"""Write a model's own answers to seemingly toxic prompts, for stage 2: ``python launchers/answer.py --out FILE``.

FILE becomes JSONL with the columns prompt and response; refusals are left out. Name it under data.answered. Runs in one
process. Exit codes: 0 done, 2 something to put right (one line says what).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dcr_scale.command_line import exit_code, leave
from dcr_scale.config import ModelConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--prompts", metavar="FILE", help="seemingly toxic ones (default: the built-in training ones)")
    parser.add_argument("--seed", type=int, default=0, help="the training run's: what it holds out is not asked")
    parser.add_argument("--limit", type=int, default=200, help="prompts asked at most (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of an answer (default: %(default)s)")
    parser.add_argument("--system-prompt", help="system message of every chat (default: what the template puts)")
    return parser.parse_args()


def answer() -> None:
    given = parse_arguments()
    # Only now: a typing error should not wait for heavy imports.
    from dcr_scale.baselines.command import write_answers

    write_answers(
        ModelConfig(path=given.model),
        given.out,
        file=given.prompts,
        seed=given.seed,
        limit=given.limit,
        max_new_tokens=given.max_new_tokens,
        system_prompt=given.system_prompt,
    )


def main() -> int:
    return exit_code(answer)


if __name__ == "__main__":
    leave(main())
