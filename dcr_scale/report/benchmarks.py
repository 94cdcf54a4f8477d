"""The report's comparison of models on benchmark suites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcr_scale.errors import UserError
from dcr_scale.evaluation.suites import CLASSES
from dcr_scale.report import figures
from dcr_scale.report.changes import NAMES, Change, Headline, aligned, changes, headline, percent, points, side_by_side
from dcr_scale.report.figures import Figure
from dcr_scale.report.records import Evaluation


@dataclass(frozen=True)
class Benchmarks:
    """Suites that all models have answered: a headline over all prompts, a table and a figure by suite, the answers.

    ``warnings`` name what could not be compared.
    """

    headline: Headline
    table: dict[str, Any]
    figure: Figure
    marks: list[tuple[str, str]]
    labels: list[str]
    answers: dict[str, Any]
    warnings: list[str]


def benchmarks(evaluations: Sequence[Evaluation]) -> Benchmarks:
    """Compare the models, the first one being what the others are compared with."""
    models = _names(evaluations)
    suites = [name for name in evaluations[0].suites if all(name in other.suites for other in evaluations)]
    warnings = []
    for evaluation, model in zip(evaluations, models, strict=True):
        if left := sorted(set(evaluation.suites) - set(suites)):
            warnings.append(f"{model}: {', '.join(left)} left out, as not all models have answered it.")
    warnings += _unequal(evaluations, models)
    warnings += [
        f"{model} was trained on {evaluation.trained_on[suite]} of {suite}'s prompts: its rates there say nothing of "
        "new prompts."
        for evaluation, model in zip(evaluations, models, strict=True)
        for suite in suites
        if evaluation.trained_on.get(suite)
    ]
    pooled = {
        model: [{**row, "suite": suite} for suite in suites for row in evaluation.suites[suite]]
        for model, evaluation in zip(models, evaluations, strict=True)
    }
    shared = len(aligned(list(pooled.values()))[0])
    for model, rows in pooled.items():
        if len(rows) > shared:
            warnings.append(f"{model}: {len(rows) - shared} prompts left out, as not all models have answered them.")
    found: dict[str, Change] = {}
    for suite in suites:
        by_class = changes(
            {model: evaluation.suites[suite] for model, evaluation in zip(models, evaluations, strict=True)}
        )
        for change in by_class:
            # A suite of two classes is two lines.
            found[suite if len(by_class) == 1 else f"{suite}, {NAMES[change.label].lower()}"] = change
    found = {name: change for label in CLASSES for name, change in found.items() if change.label == label}
    return Benchmarks(
        headline=headline(changes(pooled), models[0], models[-1]),
        table=_table(found, models),
        figure=figures.suites(found, models),
        marks=figures.model_marks(models),
        labels=[label for label in CLASSES if any(change.label == label for change in found.values())],
        answers=side_by_side(pooled),
        warnings=warnings,
    )


# What changes answers without being the model's, and what the page calls it.
_ASKED = {
    "engine": "engine",
    "precision": "precision",
    "max_new_tokens": "longest answer",
    "system_prompt": "system prompt",
    "chat_template": "chat template",
}


def _unequal(evaluations: Sequence[Evaluation], models: Sequence[str]) -> list[str]:
    """Where a model was asked in another way than the first."""
    first, warnings = evaluations[0].asked, []
    for evaluation, model in zip(evaluations[1:], models[1:], strict=True):
        asked = evaluation.asked
        other = [title for key, title in _ASKED.items() if key in first and key in asked and first[key] != asked[key]]
        if other:
            warnings.append(f"{model} was not asked as {models[0]} was: another {', another '.join(other)}.")
    return warnings


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the models are called: where two have one name, as ``aligned`` of two runs, by as much of their folders'
    paths as tells them apart.

    Raises UserError for one that is given twice.
    """
    names = [evaluation.name for evaluation in evaluations]
    paths = [evaluation.folder.resolve().parts for evaluation in evaluations]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        if len(set(names)) == len(names):
            break
        ends = ["/".join(path[-depth:]) for path in paths]
        names = [
            end if [e.name for e in evaluations].count(evaluation.name) > 1 else evaluation.name
            for evaluation, end in zip(evaluations, ends, strict=True)
        ]
    if len(set(names)) < len(names):
        raise UserError(f"{evaluations[0].folder}: is given twice; give each evaluation once")
    return names


def _table(found: dict[str, Change], models: Sequence[str]) -> dict[str, Any]:
    rows = []
    for name, change in found.items():
        cells = [(percent(rate.estimate), f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]") for rate in change.rates]
        if change.difference is not None:
            span = f"[{points(change.difference.low)}, {points(change.difference.high)}]"
            cells.append((points(change.difference.estimate), span))
        rows.append({"kind": change.label, "title": name, "note": f"{change.prompts} prompts", "cells": cells})
    columns = [*models, *(["last − first, points"] if len(models) > 1 else [])]
    return {"corner": "suite", "columns": columns, "rows": rows}
