"""Run the study's cells, a few side by side, and write down what they say."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

from dcr_scale.config import load_config
from dcr_scale.errors import UserError
from dcr_scale.evaluation.contamination import overlap
from dcr_scale.runlog import duration
from dcr_scale.study.cell import Study, judge_digest
from dcr_scale.study.data import builtin_data, research_data, trained_on
from dcr_scale.study.grid import Cell, confirmation_grid, first_grid, quick_grid, second_grid
from dcr_scale.study.methods import METHODS

log = logging.getLogger(__name__)

GRIDS = {"first": first_grid, "second": second_grid, "confirmation": confirmation_grid, "quick": quick_grid}
# Grids that go together: those that explore, those of other prompts, and those of few.
Kind = Literal["study", "confirmation", "quick"]
# Prompts of a suite, and matched pairs whose kernel similarity is measured.
_PROMPTS: dict[Kind, int] = {"study": 80, "confirmation": 80, "quick": 20}
_PAIRS: dict[Kind, int] = {"study": 64, "confirmation": 64, "quick": 8}
# The quick study's stages are shorter than the configuration's, to stay below half an hour on two slow cores.
_SHORTER: dict[Kind, list[str]] = {
    "study": [],
    "confirmation": [],
    "quick": ["refine.steps=24", "align.examples=128", "probe.pairs=4", "probe.prompts=8"],
}
_SUITES = "suites.json"


def kind_of(grids: Sequence[str]) -> Kind:
    """Raises UserError for grids that do not go together: their records are of different prompts."""
    if set(grids) <= {"first", "second"}:
        return "study"
    if list(grids) not in (["confirmation"], ["quick"]):
        raise UserError(f"--grid {' '.join(grids)}: confirmation and quick have records of their own; give one alone")
    return cast(Kind, grids[0])


def records_folder(results: Path, research: bool, kind: Kind) -> Path:
    """Where records lie unless told otherwise: those of our own prompts, of few prompts, or of new ones, apart."""
    if kind == "study":
        return results / ("study" if research else "study_builtin")
    return results / f"study_{kind}"


def open_study(config: str, records: Path, work: Path, data: Path, kind: Kind) -> Study:
    """The study as its configuration has it: on research data where ``data`` is a folder, else on our own prompts.

    Raises UserError for a configuration without both stages, for a confirmation without research data, and for suites
    that share prompts with what is trained on.
    """
    base = load_config(config, _SHORTER[kind])
    if base.refine is None or base.align is None or base.align.examples is None:
        raise UserError(f"{config}: the study needs refine, align and align.examples")
    prompts = _PROMPTS[kind]
    if data.is_dir():
        found = research_data(data, prompts, beyond=_PROMPTS["study"] if kind == "confirmation" else 0)
    elif kind == "confirmation":
        raise UserError(f"{data}: no such folder, and the built-in prompts are too few for a confirmation on new ones")
    else:
        found = builtin_data(work / "data", prompts)
    training = trained_on(found)
    for name, suite in found.suites.items():
        warning = overlap(name, suite, training).warning()
        if warning:
            raise UserError(warning)
    return Study(base, found, records, work, kernel_pairs=_PAIRS[kind])


def pending(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """Those without a record that the data at hand can make. Raises UserError for records that were made by other
    settings."""
    known = study.data.contrast
    return [cell for cell in cells if METHODS[cell.method].contrast in (None, *known) and study.finished(cell) is None]


def run_cells(study: Study, cells: Sequence[Cell], command: Sequence[str], jobs: int) -> None:
    """Finish every cell, ``jobs`` at a time, each by ``command`` and its name in a process of its own.

    Each has cores of its own: two cells side by side take less time than one on two cores. Raises UserError where one
    fails; what others have finished stays.
    """
    _write_suites(study)
    waiting, began = pending(study, cells), time.perf_counter()
    running: dict[Cell, tuple[subprocess.Popen, set[int]]] = {}
    lacking = {METHODS[c.method].title for c in cells if METHODS[c.method].contrast not in (None, *study.data.contrast)}
    if lacking:
        log.info("left out, as the prompts of their stage 1 are not there: %s", ", ".join(sorted(lacking)))
    log.info("%d of %d cells are finished or left out", len(cells) - len(waiting), len(cells))
    total = len(waiting)
    cores = sorted(os.sched_getaffinity(0))
    free = [set(cores[job::jobs] or cores) for job in range(jobs)]
    try:
        while waiting or running:
            while waiting and free:
                cell, own = waiting.pop(0), free.pop(0)
                path = study.work / "logs" / f"{cell.name}.log"
                path.parent.mkdir(parents=True, exist_ok=True)
                os.sched_setaffinity(0, own)  # which the new process inherits
                with path.open("w", encoding="utf-8") as file:
                    running[cell] = subprocess.Popen([*command, cell.name], stdout=file, stderr=file), own
                os.sched_setaffinity(0, cores)
            time.sleep(1)
            for cell, (process, own) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                free.append(own)
                if process.returncode:
                    raise UserError(f"cell {cell.name} failed; see {study.work / 'logs' / f'{cell.name}.log'}")
                done = total - len(waiting) - len(running)
                spent = time.perf_counter() - began
                left = duration(spent / done * (total - done))
                log.info("%s finished: %d of %d, about %s left", cell.name, done, total, left)
    finally:
        for process, _ in running.values():
            process.terminate()


def cell_named(name: str) -> Cell:
    for grid in GRIDS.values():
        for cell in grid():
            if cell.name == name:
                return cell
    raise UserError(f"no cell of the study is called {name!r}")


def read_records(folder: Path) -> tuple[list[dict], dict[str, dict]]:
    """The finished cells' records, and what the suites consist of. Raises UserError where there are none, and for
    records of another judge."""
    suites = folder / _SUITES
    paths = sorted(path for path in folder.glob("*_seed*.json"))
    if not paths or not suites.is_file():
        raise UserError(f"{folder}: no cell of the study is finished; run `make study`")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    stale = [path.name for path, record in zip(paths, records, strict=True) if record["judge"] != judge_digest()]
    if stale:
        raise UserError(
            f"{folder}: {len(stale)} records are by another judge ({stale[0]}, …); `make study` asks it anew"
        )
    return records, json.loads(suites.read_text(encoding="utf-8"))


def _write_suites(study: Study) -> None:
    """What was asked, without its text. Raises UserError where records of other prompts lie there."""
    path = study.records / _SUITES
    found = study.data.categories()
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != found:
        raise UserError(f"{path}: the records there are of other prompts than these; give another --records")
    study.records.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
