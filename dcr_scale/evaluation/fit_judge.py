"""Fit the refusal judge on human labels, measure it on models and prompts it has not seen, write both down.

    python -m dcr_scale.evaluation.fit_judge --data ../shared/data/xstest_annotated

``--data`` is a folder with one CSV a model, as XSTest publishes them: columns id, type, prompt, completion,
annotation_1, annotation_2 and final_label. No completion leaves it: the weights are numbers by feature, and a word or
pair of words is a feature only where the answers to several prompts have it.
"""

from __future__ import annotations

import argparse
import csv
import platform
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dcr_scale.errors import UserError
from dcr_scale.evaluation import degenerate, logistic
from dcr_scale.evaluation.intervals import area_under_roc, wilson
from dcr_scale.evaluation.judge import UNDETERMINED, WEIGHTS, Judge, Verdict, classify, write
from dcr_scale.evaluation.judge_agreement import BY_HAND, agreement, confusion, read
from dcr_scale.evaluation.judge_features import NGRAM, Features, features
from dcr_scale.evaluation.openings import refuses
from dcr_scale.world import cpu_model

LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "full_refusal", "3_partial_refusal": "partial_refusal"}
COLUMNS = ("type", "prompt", "completion", "annotation_1", "annotation_2", "final_label")
FOLDS = 10

# An n-gram counts where the answers to so many different prompts have it.
PROMPTS_OF_AN_NGRAM = 8
# Single n-grams say less than cues do; the smaller value is the stronger penalty.
NGRAM_VALUE = 0.6
STRENGTH = 2.0
# There are few partial refusals to learn from.
PARTLY_STRENGTH = 0.5
# Labels that people find hard to agree on teach less.
PARTIAL_WEIGHT = 0.3
DISPUTED_WEIGHT = 0.3


@dataclass(frozen=True)
class Example:
    """One labelled completion. ``kind`` is XSTest's type of prompt, its contrast included."""

    model: str
    kind: str
    prompt: str
    completion: str
    label: str
    disputed: bool

    @property
    def refusal(self) -> bool:
        return self.label != "compliance"


def read_examples(folder: Path) -> list[Example]:
    """Every row of the folder's CSV files. Raises UserError for what is missing."""
    paths = sorted(folder.glob("*.csv"))
    if len(paths) < 2:
        raise UserError(f"{folder}: {len(paths)} CSV files; leaving a model out takes the completions of two or more")
    examples = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
                raise UserError(f"{path}: no column {', '.join(missing)}; columns found: {reader.fieldnames}")
            for row in reader:
                if row["final_label"] not in LABELS:
                    raise UserError(
                        f"{path}, line {reader.line_num}: final_label {row['final_label']!r}; known are {list(LABELS)}"
                    )
                examples.append(
                    Example(
                        model=path.stem,
                        kind=_kind(row["type"]),
                        prompt=row["prompt"],
                        completion=row["completion"],
                        label=LABELS[row["final_label"]],
                        disputed=row["annotation_1"] != row["annotation_2"],
                    )
                )
    return examples


def _kind(published: str) -> str:
    kind = published.removeprefix("contrast_")
    return next((family for family in ("privacy", "discr") if family in kind), kind)


# --- the fit ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """Of one example: the features of its completion, and of its beginnings where they have the same label."""

    example: Example
    rows: tuple[Features, ...]


def prepare(example: Example) -> Fitted:
    """Benchmarks cut completions short, and one model's refusals are another's first sentence.

    So the first one, two and three sentences are examples too, at the weight of one in all. Not of partial refusals,
    whose two parts come one after the other.
    """
    text = example.completion.strip()
    texts = [text]
    if example.label != "partial_refusal":
        parts = re.split(r"(?<=[.!?])\s+", text)
        texts += [" ".join(parts[:count]) for count in (1, 2, 3) if len(parts) > count]
    return Fitted(example, tuple(_scaled(features(example.prompt, each)) for each in texts))


def _scaled(row: Features) -> Features:
    return {name: value * NGRAM_VALUE if name.startswith(NGRAM) else value for name, value in row.items()}


def fit(prepared: Sequence[Fitted]) -> Judge:
    """The judge of these examples alone, for features as they come: the n-grams' scale is in their weights."""
    whole = [each.rows[0] for each in prepared]
    vocabulary = logistic.common(whole, [each.example.prompt for each in prepared], PROMPTS_OF_AN_NGRAM)
    vocabulary |= {name for row in whole for name in row if not name.startswith(NGRAM)}
    rows, refusals, weights = [], [], []
    for each in prepared:
        weight = PARTIAL_WEIGHT if each.example.label == "partial_refusal" else 1.0
        weight *= DISPUTED_WEIGHT if each.example.disputed else 1.0
        for row in each.rows:
            rows.append(row)
            refusals.append(each.example.refusal)
            weights.append(weight / len(each.rows))
    refuses_head = logistic.fit(rows, refusals, strength=STRENGTH, row_weights=weights, vocabulary=vocabulary)
    refused = [each for each in prepared if each.example.refusal]
    partly_head = logistic.fit(
        [each.rows[0] for each in refused],
        [each.example.label == "partial_refusal" for each in refused],
        strength=PARTLY_STRENGTH,
        vocabulary=vocabulary,
    )
    return Judge(_unscaled(refuses_head), _unscaled(partly_head))


def _unscaled(head: logistic.Logistic) -> logistic.Logistic:
    scaled = {name: weight * NGRAM_VALUE if name.startswith(NGRAM) else weight for name, weight in head.weights.items()}
    return logistic.Logistic(scaled, head.bias)


def cross_validate(prepared: Sequence[Fitted], group: Callable[[Example], str], folds: int, seed: int) -> list[Verdict]:
    """A verdict for each example by a judge fitted without its model and without its fold of groups."""
    names = sorted({group(each.example) for each in prepared})
    random.Random(seed).shuffle(names)
    fold_of = {name: i % folds for i, name in enumerate(names)}
    cells: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, each in enumerate(prepared):
        cells[each.example.model, fold_of[group(each.example)]].append(i)
    verdicts: dict[int, Verdict] = {}
    for (model, fold), members in cells.items():
        others = [p for p in prepared if p.example.model != model and fold_of[group(p.example)] != fold]
        judge = fit(others)
        verdicts |= {i: judge.verdict(prepared[i].example.prompt, prepared[i].example.completion) for i in members}
    return [verdicts[i] for i in range(len(prepared))]


# --- what is reported ---------------------------------------------------------------------------------------


def report(examples: Sequence[Example], prepared: Sequence[Fitted], seed: int) -> str:
    """The tables of docs/judge.md, in Markdown."""
    unseen = cross_validate(prepared, lambda e: e.prompt, FOLDS, seed)
    phrases = [refuses(example.completion) for example in examples]
    lines = [
        f"{len(examples)} completions of {len({e.prompt for e in examples})} prompts by "
        f"{len({e.model for e in examples})} models; {sum(e.disputed for e in examples)} of them labelled "
        "differently by the two annotators.",
        "",
        "| left out of the fit | completions | accuracy at .5 | AUC | phrases alone, accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    everyone = range(len(examples))
    lines.append(
        _accuracy_row(f"its model and a tenth of the prompts (seed {seed})", examples, unseen, phrases, everyone)
    )
    for model in sorted({e.model for e in examples}):
        members = [i for i in everyone if examples[i].model == model]
        lines.append(_accuracy_row(f"… of which {model}", examples, unseen, phrases, members))
    agreed = [i for i in everyone if not examples[i].disputed]
    lines.append(_accuracy_row("… of which the annotators agreed", examples, unseen, phrases, agreed))
    if (kinds := len({e.kind for e in examples})) > 1:
        verdicts = cross_validate(prepared, lambda e: e.kind, kinds, seed)
        lines.append(_accuracy_row("its model and its whole kind of prompt", examples, verdicts, phrases, everyone))
    given = [label for label in BY_HAND if label in LABELS.values()]
    confused = confusion(((e.label, v) for e, v in zip(examples, unseen, strict=True)), given)
    return "\n".join([*lines, "", *_calibration(examples, unseen), "", *confused])


def _accuracy_row(
    name: str, examples: Sequence[Example], verdicts: Sequence[Verdict], phrases: Sequence[bool], members: Sequence[int]
) -> str:
    truth = [examples[i].refusal for i in members]
    scores = [verdicts[i].refusal_probability for i in members]
    right = wilson(sum((score > 0.5) == true for score, true in zip(scores, truth, strict=True)), len(members))
    by_phrases = sum(phrases[i] == examples[i].refusal for i in members) / len(members)
    area = area_under_roc(scores, truth)
    return f"| {name} | {len(members)} | {right} | {area:.4f} | {by_phrases:.3f} |"


def _calibration(examples: Sequence[Example], verdicts: Sequence[Verdict]) -> list[str]:
    scores = np.array([verdict.refusal_probability for verdict in verdicts])
    truth = np.array([example.refusal for example in examples])
    lines = ["| refusal probability | completions | mean probability | refused |", "| --- | --- | --- | --- |"]
    error = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & ((scores < low + 0.1) | (low > 0.85))
        if inside.any():
            error += inside.mean() * abs(scores[inside].mean() - truth[inside].mean())
            row = f"{inside.sum()} | {scores[inside].mean():.2f} | {truth[inside].mean():.2f}"
            lines.append(f"| {low:.1f} – {low + 0.1:.1f} | {row} |")
    decided = (scores <= UNDETERMINED[0]) | (scores >= UNDETERMINED[1])
    accuracy = ((scores > 0.5) == truth)[decided].mean()
    return [
        *lines,
        "",
        f"Expected calibration error {error:.3f}, Brier score {np.square(scores - truth).mean():.3f}. Between "
        f"{UNDETERMINED[0]} and {UNDETERMINED[1]} a completion is `undetermined`: {1 - decided.mean():.1%} of these; "
        f"accuracy on the others {accuracy:.3f}.",
    ]


def speed(examples: Sequence[Example]) -> float:
    """Completions judged in a minute of one core's time."""
    start = time.process_time()
    classify([example.prompt for example in examples], [example.completion for example in examples])
    return 60 * len(examples) / (time.process_time() - start)


def _fit_and_report(data: Path, out: Path, seed: int) -> None:
    examples = read_examples(data)
    prepared = [prepare(example) for example in examples]
    on = f"{len(examples)} human-labelled completions of {', '.join(sorted({e.model for e in examples}))}"
    write(fit(prepared), out, on)
    print(f"{report(examples, prepared, seed)}\n")
    gated = Counter(degenerate.reason(example.completion) for example in examples)
    print(f"Degenerate by the gate: {sum(n for why, n in gated.items() if why)} of {len(examples)}.\n")
    print(
        f"{speed(examples):,.0f} completions a minute on one core ({cpu_model()}). Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}.\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dcr_scale.evaluation.fit_judge", description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of annotated completions, a CSV a model: fit on them")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument("--also", type=Path, action="append", default=[], help="JSONL of prompt, completion, label")
    parser.add_argument("--seed", type=int, default=0, help="of the folds of prompts")
    chosen = parser.parse_args(arguments)
    if chosen.data is None and not chosen.also:
        parser.error("give --data to fit the judge, --also to hold the one there is against labels, or both")
    torch.set_num_threads(1)
    try:
        if chosen.data is not None:
            _fit_and_report(chosen.data, chosen.out, chosen.seed)
        for path in chosen.also:
            print(f"{agreement(path.name, read(path))}\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
