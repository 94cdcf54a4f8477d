"""``python -m dcr_scale.report RUN_FOLDER [--evaluation DIR ...]``: the report of a finished run, made again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dcr_scale.command_line import exit_code
from dcr_scale.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on what to put right."""
    parser = argparse.ArgumentParser(
        prog="python -m dcr_scale.report", description="Write a finished run's report.html anew."
    )
    parser.add_argument("run", type=Path, help="the run's folder, such as runs/demo")
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="output folders of launchers/evaluate.py, the model to compare with first",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: report.html in the run's folder)")
    given = parser.parse_args(arguments)
    return exit_code(lambda: print(write_report(given.run, given.evaluation, given.out)))


if __name__ == "__main__":
    sys.exit(main())
