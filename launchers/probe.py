"""Compare two sets of prompts: ``deepspeed launchers/probe.py --model PATH --prompts-a FILE --prompts-b FILE``.

Runs under deepspeed, torchrun or srun, or alone. Exit codes: 0 done, 2 something to put right (one line says what).
"""

from __future__ import annotations

import argparse

from dcr_scale import typed_yaml
from dcr_scale.command_line import exit_code, first_rank, leave
from dcr_scale.config import Source
from dcr_scale.setting_flags import add_flags, as_overrides
from dcr_scale.similarity.settings import SimilarityConfig, load_settings


def parse_arguments() -> tuple[list[str], argparse.Namespace]:
    """All settings as ``key=value``, and the flags beside them. Every setting of one value has its own flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # To deepspeed's own parser --b is an ambiguous abbreviation on Pythons before 3.12.7, wherever it stands.
    add_flags(parser, SimilarityConfig, aliases=lambda name, hint: [f"--prompts-{name}"] if hint is Source else [])
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what would be measured")
    parser.add_argument(
        "--plan", type=positive, metavar="RANKS",
        help="print what it would take on so many ranks (bytes held and sent, micro-steps); reads no weights",
    )  # fmt: skip
    # The deepspeed launcher puts it in front; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as a.columns.prompt=question")
    given = parser.parse_intermixed_args()
    return as_overrides(given, SimilarityConfig) + given.overrides, given


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


def compare() -> None:
    overrides, flags = parse_arguments()
    config = load_settings(overrides)
    if flags.dry_run or flags.plan:
        if first_rank():
            from dcr_scale.similarity.command import describe, plan

            if flags.dry_run:
                print(typed_yaml.dump(config))
            print(describe(config))
            if flags.plan:
                print(plan(config, flags.plan))
        return
    from dcr_scale.similarity.command import run

    run(config)


def main() -> int:
    return exit_code(compare)


if __name__ == "__main__":
    leave(main())
