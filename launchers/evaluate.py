"""Evaluate a model: ``deepspeed launchers/evaluate.py --model PATH --suite NAME --suite NAME=FILE --out DIR``.

Runs under deepspeed, torchrun or srun, or alone with python. Exit codes: 0 done, 2 something to put right (one line
says what). The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse

from dcr_scale import typed_yaml
from dcr_scale.command_line import exit_code, first_rank, leave
from dcr_scale.evaluation.evaluate_settings import EvaluateConfig, load_settings
from dcr_scale.setting_flags import add_flags, as_overrides


def parse_arguments() -> tuple[list[str], bool]:
    """All settings as ``key=value``, and whether to evaluate nothing. Every setting but ``zero`` has its own flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser, EvaluateConfig, aliases=lambda name, hint: [])
    parser.add_argument("--dry-run", action="store_true", help="print the settings and what would be asked")
    # The deepspeed launcher puts it in front; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as zero.precision=fp32")
    given = parser.parse_intermixed_args()
    return as_overrides(given, EvaluateConfig) + given.overrides, given.dry_run


def evaluate() -> None:
    overrides, dry_run = parse_arguments()
    config = load_settings(overrides)
    if dry_run:
        if first_rank():
            from dcr_scale.evaluation.evaluate_command import describe

            print(typed_yaml.dump(config))
            print(describe(config))
        return
    from dcr_scale.evaluation.evaluate_command import run

    run(config)


def main() -> int:
    return exit_code(evaluate)


if __name__ == "__main__":
    leave(main())
