"""The report's comparison of models on benchmark suites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcr_scale.evaluation.answers import CLASSES, Row
from dcr_scale.report import figures
from dcr_scale.report.changes import NAMES, Change, Headline, changes, headline, percent, points
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
    found: dict[str, Change] = {}
    by_suite: dict[str, list[dict[tuple[str, str], Row]]] = {}
    for suite in suites:
        rows = {model: e.suites[suite] for model, e in zip(models, evaluations, strict=True)}
        by_suite[suite] = [{(row["class"], row["prompt"]): row for row in own} for own in rows.values()]
        by_class = changes(rows)
        for change in by_class:
            # A suite of two classes is two lines.
            found[suite if len(by_class) == 1 else f"{suite}, {NAMES[change.label].lower()}"] = change
    found = {name: change for label in CLASSES for name, change in found.items() if change.label == label}
    pooled = {
        model: [row for suite in suites for row in evaluation.suites[suite]]
        for model, evaluation in zip(models, evaluations, strict=True)
    }
    return Benchmarks(
        headline=headline(changes(pooled), models[0], models[-1]),
        table=_table(found, models),
        figure=figures.suites(found, models),
        marks=figures.model_marks(models),
        labels=[label for label in CLASSES if any(change.label == label for change in found.values())],
        answers=_answers(by_suite, models),
        warnings=warnings,
    )


def _names(evaluations: Sequence[Evaluation]) -> list[str]:
    """What the models are called: by their folder where two have one name, as ``aligned`` of two runs."""
    names = [evaluation.name for evaluation in evaluations]
    return [
        evaluation.name if names.count(evaluation.name) == 1 else evaluation.folder.resolve().name
        for evaluation in evaluations
    ]


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


def _answers(by_suite: dict[str, list[dict[tuple[str, str], Row]]], models: Sequence[str]) -> dict[str, Any]:
    rows = []
    for suite, by_model in by_suite.items():
        for label, prompt in by_model[0]:
            if all((label, prompt) in own for own in by_model):
                given = [own[label, prompt] for own in by_model]
                rows.append(
                    {
                        "class": label,
                        "suite": suite,
                        "prompt": prompt,
                        "answers": [
                            {"text": r["completion"], "label": r["label"], "probability": r["refusal_probability"]}
                            for r in given
                        ],
                    }
                )
    present = {row["class"] for row in rows}
    classes = [label for label in CLASSES if label in present]
    return {"models": list(models), "classes": classes, "suites": list(by_suite), "rows": rows}
