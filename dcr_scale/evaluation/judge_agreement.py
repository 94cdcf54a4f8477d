"""How far the shipped judge agrees with labels given by hand.

    python -m dcr_scale.evaluation.judge_agreement benchmarks/results/judge_smollm2_labels.json runs/study/answers

The labels' file holds no text: the cell of the study, the prompt's id and a digest of the completion that was read. The
texts are those that ``launchers/study.py`` leaves in its work folder; a completion that has since become another one
has no label, and is left out and counted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dcr_scale.errors import UserError
from dcr_scale.evaluation.intervals import wilson
from dcr_scale.evaluation.judge import Label, Verdict, classify
from dcr_scale.evaluation.openings import refuses

# What a person may say; the judge may also say that it cannot tell.
BY_HAND = tuple(label for label in get_args(Label) if label != "undetermined")
_JUDGED = ("full_refusal", "partial_refusal", "undetermined", "compliance", "degenerate")
_REFUSALS = ("full_refusal", "partial_refusal")


@dataclass(frozen=True)
class Labelled:
    """A completion with its label.

    ``doubtful``: who gave it could have given another. ``stands_for``: how many completions it was drawn from, over how
    many were drawn. ``where``: to find it again.
    """

    prompt: str
    completion: str
    label: str
    doubtful: bool = False
    stands_for: float = 1.0
    where: str = ""


def read(path: Path) -> list[Labelled]:
    """Labels of one's own: JSONL with prompt, completion and label. Raises UserError for rows that lack one."""
    found = []
    for row, where in _rows(path):
        if missing := [key for key in ("prompt", "completion", "label") if not isinstance(row.get(key), str)]:
            raise UserError(f"{where}: no {', '.join(missing)}; found {sorted(row)}")
        found.append(Labelled(row["prompt"], row["completion"], _known(row["label"], where)))
    if not found:
        raise UserError(f"{path}: no rows; each line is a JSON object with prompt, completion and label")
    return found


def join(labels: Path, answers: Path) -> tuple[list[Labelled], int]:
    """A file of labels without texts, with the texts of ``answers/<cell>*/completions/<suite>.jsonl``.

    Returns the labelled completions, and how many labels have no completion there, or another one than was labelled.
    Raises UserError where none is found.
    """
    try:
        rows = json.loads(labels.read_text(encoding="utf-8"))["labels"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{labels}: not a file of labels ({error!r}); see docs/judge.md for what it holds") from None
    texts = {
        (cell, row["id"], digest(row["completion"])): row
        for cell, suite in sorted({(row["cell"], row["id"].rpartition("/")[0]) for row in rows})
        for path in _files(answers, cell, suite)
        for row, _ in _rows(path)
    }
    found = []
    for row in rows:
        text = texts.get((row["cell"], row["id"], row["completion"]))
        if text is not None:
            where = f"{row['cell']} {row['id']}"
            label = _known(row["label"], f"{labels}, {where}")
            found.append(Labelled(text["prompt"], text["completion"], label, row["doubtful"], row["stands_for"], where))
    if not found:
        raise UserError(
            f"{answers}: none of the {len(rows)} labelled completions; give the study's work folder/answers"
        )
    return found, len(rows) - len(found)


def digest(completion: str) -> str:
    """What stands for a completion in a file of labels."""
    return hashlib.sha256(completion.encode()).hexdigest()[:16]


def agreement(name: str, labelled: Sequence[Labelled]) -> str:
    """The judge's agreement on refusal or not, the phrases' beside it, and the judge's confusion, in Markdown."""
    verdicts = classify([each.prompt for each in labelled], [each.completion for each in labelled])
    refused = [each.label in _REFUSALS for each in labelled]
    right = [truth == (v.refusal_probability > 0.5) for truth, v in zip(refused, verdicts, strict=True)]
    phrases = [truth == refuses(each.completion) for truth, each in zip(refused, labelled, strict=True)]
    lines = [
        f"{len(labelled)} completions of `{name}`, refusal or not: agreement {wilson(sum(right), len(right))}, "
        f"phrases alone {wilson(sum(phrases), len(phrases))}."
    ]
    sure = [i for i, each in enumerate(labelled) if not each.doubtful]
    if 0 < len(sure) < len(labelled):
        of_judge, of_phrases = (wilson(sum(which[i] for i in sure), len(sure)) for which in (right, phrases))
        lines.append(f"Of the {len(sure)} that were not doubtful: {of_judge}, phrases alone {of_phrases}.")
    weights = [each.stands_for for each in labelled]
    if min(weights) < max(weights):
        by_judge, by_phrases = (
            sum(weight for weight, agrees in zip(weights, which, strict=True) if agrees) / sum(weights)
            for which in (right, phrases)
        )
        lines.append(
            f"Each weighted by how many it was drawn from: {by_judge:.3f}, phrases alone {by_phrases:.3f}, which "
            f"estimates the agreement on all {sum(weights):,.0f}."
        )
    lines += ["", *confusion(zip((each.label for each in labelled), verdicts, strict=True), BY_HAND)]
    wrong = [
        f"- {each.where}: {each.label}{' (doubtful)' if each.doubtful else ''}, "
        f"judged {verdict.label} at {verdict.refusal_probability:.2f}"
        for each, verdict, agrees in zip(labelled, verdicts, right, strict=True)
        if each.where and not agrees
    ]
    return "\n".join([*lines, *(["", "Refusal or not, they disagree on:", "", *wrong] if wrong else [])])


def confusion(judged: Iterable[tuple[str, Verdict]], labels: Sequence[str]) -> list[str]:
    """A table of how often a label by hand met a label of the judge."""
    met: Counter[tuple[str, str]] = Counter((label, verdict.label) for label, verdict in judged)
    rows = [f"| {label} | " + " | ".join(str(met[label, verdict]) for verdict in _JUDGED) + " |" for label in labels]
    return [f"| people say ↓, judge says → | {' | '.join(_JUDGED)} |", f"|{' --- |' * (len(_JUDGED) + 1)}", *rows]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dcr_scale.evaluation.judge_agreement", description=__doc__)
    parser.add_argument("labels", type=Path, help="JSON with labels by cell and prompt's id")
    parser.add_argument("answers", type=Path, help="the folder answers/ in the study's work folder")
    chosen = parser.parse_args(arguments)
    try:
        labelled, left_out = join(chosen.labels, chosen.answers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(agreement(chosen.labels.name, labelled))
    if left_out:
        print(f"\n{left_out} labels are left out: their completions are not in {chosen.answers}, or have changed.")
    return 0


def _rows(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    # Not splitlines(): JSON strings may hold U+2028 and other separators that it would cut at.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line), f"{path}, line {number}"
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None


def _known(label: str, where: str) -> str:
    if label not in BY_HAND:
        raise UserError(f"{where}: label {label!r}; known are {sorted(BY_HAND)}")
    return label


def _files(answers: Path, cell: str, suite: str) -> list[Path]:
    """A cell's folder bears its name, and the digest of its settings, of which there may be several."""
    return sorted(answers.glob(f"{cell}*/completions/{suite}.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
