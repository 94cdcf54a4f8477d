"""What a run's folder and evaluations' folders hold, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dcr_scale.errors import UserError
from dcr_scale.evaluation.suites import CLASSES

Row = dict[str, Any]

LOOKS = ("before", "refined", "aligned")


@dataclass(frozen=True)
class RunRecord:
    """One finished run.

    ``answers`` holds, by look and in the order of the run, the rows of ``look/*.jsonl``, judged and each with its
    ``class``. ``activations`` and ``kernels`` are ``look/activations.json`` and ``kernel_similarity.json``, None
    where the run left none.
    """

    folder: Path
    summary: Mapping[str, Any]
    settings: Mapping[str, Any]
    settings_text: str
    metrics: Sequence[Row]
    answers: Mapping[str, list[Row]]
    activations: Mapping[str, Any] | None
    kernels: Mapping[str, Any] | None

    def rows(self, stage: str) -> list[Row]:
        """The rows of metrics.jsonl of one stage, such as ``refine`` or ``align/probe``."""
        return [row for row in self.metrics if row["stage"] == stage]


@dataclass(frozen=True)
class Evaluation:
    """One model's answers to suites: ``suites`` has its judged rows by the suite's name.

    ``trained_on`` says how many of a suite's prompts the model's run was trained on, where that is known; ``asked`` how
    the answers were got.
    """

    folder: Path
    name: str
    suites: Mapping[str, list[Row]]
    trained_on: Mapping[str, int] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)


def read_run(folder: Path) -> RunRecord:
    """Raises UserError where the folder holds no finished run, or a file of it cannot be read."""
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder}: no summary.json, so no finished run lies here; give a run's folder, runs/<name>")
    text = _text(folder / "config.yaml")
    summary = _object(folder / "summary.json")
    names = [name for name in LOOKS if (folder / "look" / f"{name}.jsonl").is_file()]
    return RunRecord(
        folder=folder,
        summary=summary,
        settings=yaml.safe_load(text),
        settings_text=text,
        metrics=_rows(folder / "metrics.jsonl"),
        answers={name: _answers(folder / "look" / f"{name}.jsonl") for name in names},
        activations=_optional(folder / "look" / "activations.json"),
        kernels=_optional(folder / "kernel_similarity.json"),
    )


def read_evaluation(folder: Path) -> Evaluation:
    """An output folder of launchers/evaluate.py. Raises UserError where it is none, or a file cannot be read."""
    paths = sorted((folder / "completions").glob("*.jsonl"))
    if not paths:
        raise UserError(
            f"{folder}: no completions/*.jsonl, so no evaluation lies here; give evaluate.py's --out folder"
        )
    summary = _optional(folder / "summary.json") or {}
    name = Path(str(summary.get("model", folder))).name
    trained_on = {found["suite"]: found["trained_on"] for found in summary.get("contamination") or []}
    answers = {path.stem: _answers(path) for path in paths}
    return Evaluation(folder, name, answers, trained_on, summary.get("identity", {}))


def _answers(path: Path) -> list[Row]:
    """Completions with their verdicts."""
    rows = _rows(path)
    for number, row in enumerate(rows, 1):
        for key in ("class", "prompt", "completion", "label", "refusal_probability"):
            if key not in row:
                raise UserError(f"{path}: row {number} has no {key!r}; let the run or evaluation write it anew")
        if row["class"] not in CLASSES:
            raise UserError(f"{path}: row {number} is of class {row['class']!r}; known are {', '.join(CLASSES)}")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the report needs it") from None


def _object(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no JSON ({error}); remove it, or let the run write it anew") from None


def _optional(path: Path) -> dict[str, Any] | None:
    return _object(path) if path.is_file() else None


def _rows(path: Path) -> list[Row]:
    rows = []
    # Not splitlines, which would also part a prompt at a Unicode line separator.
    for number, line in enumerate(_text(path).split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: no JSON ({error}); remove the line") from None
    return rows
