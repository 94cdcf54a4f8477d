"""Compare methods at equal defence: ``python launchers/study.py``; `make study` says the same.

Trains and judges every cell that has no record yet, so that the same command goes on where it was cut off, then writes
docs/study.md's tables and pictures from all records. Exit codes: 0 done, 2 something to put right (one line says what).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dcr_scale.command_line import exit_code, leave
from dcr_scale.errors import UserError

ROOT = Path(__file__).parents[1]
RESEARCH_DATA = ROOT.parent / "shared" / "data"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--grid", nargs="+", default=["first", "second"], choices=("first", "second", "confirmation", "quick"),
        help="cells to run (default: first second)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells side by side (default: one a core)")
    parser.add_argument(
        "--config",
        default=str(ROOT / "configs" / "study.yaml"),
        help="where cells start (default: configs/study.yaml; quick has shorter stages)",
    )
    parser.add_argument("--records", type=Path, help="folder of finished cells (default: in benchmarks/results)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder of checkpoints")
    parser.add_argument("--data", type=Path, default=RESEARCH_DATA, help="research data sets")
    parser.add_argument("--report-only", action="store_true", help="train nothing; write up what is finished")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


def study() -> None:
    given = parse_arguments()
    from dcr_scale.runlog import configure_console
    from dcr_scale.study import command, document

    kind = command.kind_of(given.grid)
    results = ROOT / "benchmarks" / "results"
    if given.data != RESEARCH_DATA and not given.data.is_dir():
        raise UserError(f"--data {given.data}: no such folder")
    # What is committed can be written up without the data that it was measured on, unless there are records of our own.
    own_records = given.records is not None or command.records_folder(results, False, "study").is_dir()
    research = given.data.is_dir() or (given.report_only and not own_records)
    records = given.records or command.records_folder(results, research, kind)
    configure_console(0)
    if not given.report_only:
        opened = command.open_study(given.config, records, given.work, given.data, kind)
        if given.cell:
            opened.run(command.cell_named(given.cell))
            return
        cells = [cell for name in given.grid for cell in command.GRIDS[name]()]
        own = [sys.executable, __file__, *_same(given), "--cell"]
        command.run_cells(opened, cells, own, max(1, given.jobs))
    # The page is about published suites.
    page = ROOT / "docs" / "study.md" if kind != "quick" and research else None
    if kind == "confirmation":
        headline = document.confirm(records, page, command.records_folder(results, research, "study"))
    else:
        headline = document.write(records, page)
    print(headline)


def _same(given: argparse.Namespace) -> list[str]:
    """The flags that every cell's own process needs."""
    flags = ["--grid", *given.grid, "--config", given.config, "--work", str(given.work), "--data", str(given.data)]
    return flags + (["--records", str(given.records)] if given.records else [])


def main() -> int:
    return exit_code(study)


if __name__ == "__main__":
    leave(main())
