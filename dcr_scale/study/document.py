"""docs/study.md's tables and pictures, from the records alone.

The page's words are written by hand; what stands between ``<!-- study:NAME -->`` and ``<!-- /study:NAME -->`` is
replaced.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcr_scale.errors import UserError
from dcr_scale.runlog import duration
from dcr_scale.study import pictures
from dcr_scale.study.analysis import Curve, common_defence, curves, paired, rate, ratio
from dcr_scale.study.command import read_records
from dcr_scale.study.grid import SHARES
from dcr_scale.study.methods import CLAIMED, METHODS
from dcr_scale.study.verdict import by_all_seeds, perplexity_ratios, shown, verdict


def write(records: Path, page: Path | None) -> str:
    """Bring the page's blocks and pictures up to date, and return its first table. None: only the table."""
    found, suites, lines, headline = _compared(records)
    if page is not None:
        folder = page.parent / "pictures"
        folder.mkdir(exist_ok=True)
        pictures.trade_off(folder / "study_trade_off.png", lines)
        probed = [record for record in found if "curve" in record["probe"].get("align", {})]
        seed = min((record["cell"]["seed"] for record in probed), default=None)
        if probed:
            of_one_seed = [record for record in probed if record["cell"]["seed"] == seed]
            pictures.training_curves(folder / "study_curves.png", of_one_seed)
        blocks = {
            "verdict": verdicts(lines, found),
            "comparison": headline,
            "along": along(lines),
            "rivals": rivals(lines),
            "points": points(lines, found),
            "suites": by_suite(lines),
            "cost": cost(found),
            "failures": failures(lines, suites),
            "moments": moments(found),
            "kernel": kernel(found),
            "setting": setting(found, suites),
        }
        page.write_text(filled(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    return headline


def confirm(records: Path, page: Path | None, explored: Path) -> str:
    """The same of the confirmation, which has a block of its own. ``explored``: the records of the study it confirms,
    whose seeds are put together with its own."""
    found, suites, lines, headline = _compared(records)
    answers = [answer for answer in verdict(lines, found, CLAIMED[-1]) if answer[-1] != "not measured"]
    if page is not None:
        parts = [headline, _table([_goals(CLAIMED[-1]), *answers])]
        if explored.is_dir():
            before, _, lines_before = _read(explored)
            head = (f"{METHODS[CLAIMED[-1]].title}, seeds of both", "each seed", "mean, t interval")
            parts.append(_table([head, *by_all_seeds([(lines_before, before), (lines, found)], CLAIMED[-1])]))
        parts.append(setting(found, suites))
        page.write_text(
            filled(page.read_text(encoding="utf-8"), {"confirmation": "\n\n".join(parts)}), encoding="utf-8"
        )
    return headline


def _compared(records: Path) -> tuple[list[dict], dict[str, dict], dict[str, Curve], str]:
    """The records, their suites, the curves by the judge, and every method against STL."""
    found, suites, lines = _read(records)
    if "stl" not in lines:
        raise UserError(f"{records}: no seed of STL has all its shares yet; there is nothing to compare with")
    return found, suites, lines, comparison(lines, curves(found, _classes(suites), by="phrases"))


def _read(records: Path) -> tuple[list[dict], dict[str, dict], dict[str, Curve]]:
    found, suites = read_records(records)
    return found, suites, curves(found, _classes(suites))


def _classes(suites: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: suite["class"] for name, suite in suites.items()}


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The page with each block's content replaced. Raises UserError for a page without one of them."""
    for name, content in blocks.items():
        begin, end = f"<!-- study:{name} -->\n", f"<!-- /study:{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise UserError(f"docs/study.md has no block {begin.strip()} … {end}")
        text = before + begin + content + "\n" + end + after
    return text


def verdicts(lines: Mapping[str, Curve], records: Sequence[Mapping[str, Any]]) -> str:
    """The goals of every kind of DCR that is claimed: :func:`~dcr_scale.study.verdict.verdict`."""
    tables = [_table([_goals(name), *verdict(lines, records, name)]) for name in CLAIMED if name in lines]
    return "\n\n".join(tables)


def _goals(method: str) -> tuple[str, ...]:
    """The head of a table of goals."""
    return METHODS[method].title, "measured", "each seed: t interval", "holds"


def comparison(lines: Mapping[str, Curve], by_phrases: Mapping[str, Curve]) -> str:
    """Every method against STL where they defend equally well."""
    head = ("method", "seeds", "seemingly toxic, × STL", "the same by phrases", "general, × STL", "at defence")
    rows: list[tuple[str, ...]] = [head]
    stl = lines["stl"]
    for name, line in _in_order(lines):
        if name != "stl":
            phrases = ratio(by_phrases[name], by_phrases["stl"])
            compared = (shown(ratio(line, stl)), shown(phrases), shown(ratio(line, stl, "general")))
            rows.append((METHODS[name].title, _seeds(line, stl), *compared, _range(line, stl)))
    return _table(rows)


def along(lines: Mapping[str, Curve]) -> str:
    """Each claimed kind of DCR by STL at single points of defence success."""
    rows: list[tuple[str, ...]] = [("method", "at defence", "seemingly toxic", "general")]
    for name in CLAIMED:
        if name not in lines:
            continue
        ours, theirs = paired(lines[name], lines["stl"])
        for defence in np.linspace(*common_defence(ours, theirs), 6) if ours.seeds else ():
            at = np.array([defence])
            with np.errstate(divide="ignore", invalid="ignore"):  # where STL refuses nothing
                ratios = [
                    (ours.at(at, of_class=of) / theirs.at(at, of_class=of))[0] for of in ("seemingly_toxic", "general")
                ]
            rows.append((METHODS[name].title, f"{defence:.2f}", *(f"{ratio:.2f}" for ratio in ratios)))
    return _table(rows)


def rivals(lines: Mapping[str, Curve]) -> str:
    """Each claimed kind of DCR by every other method, where they defend equally well."""
    tables = []
    for ours in CLAIMED:
        if ours not in lines:
            continue
        rows: list[tuple[str, ...]] = [
            (f"{METHODS[ours].title} by", "seeds", "seemingly toxic", "general", "at defence")
        ]
        dcr = lines[ours]
        for name, line in _in_order(lines):
            if name != ours:
                compared = shown(ratio(dcr, line)), shown(ratio(dcr, line, "general"))
                rows.append((METHODS[name].title, _seeds(dcr, line), *compared, _range(dcr, line)))
        tables.append(_table(rows))
    return "\n\n".join(tables)


def points(lines: Mapping[str, Curve], records: Sequence[Mapping[str, Any]]) -> str:
    """Each model of each method as a point, and how many of all its answers are degenerate: those refuse nothing."""
    head = ("method", "seeds", "refusals in stage 2", "defence success", "refused, seemingly toxic", "refused, general")
    rows: list[tuple[str, ...]] = [(*head, "degenerate")]
    for name, line in _in_order(lines):
        for at, share in enumerate(line.shares):
            rates = [shown(rate(line, of, at)) for of in ("toxic", "seemingly_toxic", "general")]
            labels = "".join(
                verdicts["labels"]
                for record in records
                if (record["cell"]["method"], record["cell"]["share"]) == (name, share)
                for verdicts in record["suites"].values()
            )
            seeds = str(len(line.seeds))
            rows.append((METHODS[name].title, seeds, f"{share:.0%}", *rates, f"{labels.count('D') / len(labels):.1%}"))
    return _table(rows)


def by_suite(lines: Mapping[str, Curve]) -> str:
    """Refusal rate of each suite, where each method defends as STL does at its middle share; methods whose line does
    not reach that far, or that lack one of STL's seeds, are left out."""
    defence, suites = _middle_defence(lines), lines["stl"].classes
    named = {suite: of_class.replace("_", " ") for suite, of_class in suites.items()}
    head = (suite if suite == of_class else f"{suite}, {of_class}" for suite, of_class in named.items())
    rows: list[tuple[str, ...]] = [("method", *head)]
    for name, line in _in_order(lines):
        found = [each for suite in suites if (each := line.each(suite, defence)) is not None]
        if found and line.seeds == lines["stl"].seeds:
            rows.append((METHODS[name].title, *(f"{each.mean():.2f}" for each in found)))
    return _table(rows)


def cost(records: Sequence[Mapping[str, Any]]) -> str:
    """Core-minutes and updates of the stages, medians over cells."""
    head = ("method", "cells", "stage 1, core-minutes", "stage 2", "judging", "tokens generated")
    rows = [(*head, "stage 1 updates", "perplexity", "by STL's of the same share and seed")]
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["cell"]["method"], []).append(record)
    for name in METHODS:
        cells = by_method.get(name, [])
        if cells:
            refine = [c["seconds"]["refine"] * c["threads"] for c in cells if "refine" in c["seconds"]]
            updates = [c["refine"]["updates"] for c in cells if "refine" in c]
            perplexity = [c["perplexity"]["estimate"] for c in cells]
            # Answers that were kept from an earlier start cost nothing here.
            asked = [c for c in cells if c["generated_tokens"]]
            rows.append(
                (
                    METHODS[name].title,
                    str(len(cells)),
                    f"{np.median(refine) / 60:.1f}" if refine else "–",
                    f"{np.median([c['seconds']['align'] * c['threads'] for c in cells]) / 60:.1f}",
                    f"{np.median([c['seconds']['judge'] * c['threads'] for c in asked]) / 60:.1f}" if asked else "–",
                    f"{np.median([c['generated_tokens'] for c in asked]):.0f}" if asked else "–",
                    f"{np.median(updates):.0f}" if updates else "–",
                    f"{np.median(perplexity):.2f}",
                    ", ".join(f"{ratio:.3f}" for ratio in sorted(perplexity_ratios(records, name).values())) or "–",
                )
            )
    return _table(rows)


def failures(lines: Mapping[str, Curve], suites: Mapping[str, Any]) -> str:
    """What the best DCR there is still gets wrong where it defends as STL does at its middle share: categories, worst
    first."""
    best = next((name for name in reversed(CLAIMED) if name in lines), "stl")
    rows = [("suite", "category", f"wrong: {METHODS[best].title}", "STL", "of", "most often")]
    defence = _middle_defence(lines)
    for suite, of_class in lines["stl"].classes.items():
        ours, theirs = (lines[name].each(suite, defence) for name in (best, "stl"))
        if of_class == "general" or ours is None or theirs is None:
            continue
        ours, theirs = (np.abs(refused - (of_class == "toxic")) for refused in (ours, theirs))
        named = suites[suite]["categories"]
        counts = Counter({c: ours[[n == c for n in named]].sum() for c in dict.fromkeys(named)})
        for category, wrong in counts.most_common(3):
            members = [i for i, name in enumerate(named) if name == category]
            worst = sorted(members, key=lambda i: -ours[i])[:3]
            ids = ", ".join(suites[suite]["ids"][i].split("/")[1] for i in worst if ours[i] > 0)
            rows.append(
                (suite, category or "–", f"{wrong:.1f}", f"{theirs[members].sum():.1f}", str(len(members)), ids)
            )
    return _table(rows)


def moments(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean kernel similarity of held-out matched pairs, untrained, after stage 1 and after stage 2."""
    names = ("untrained", "refined", "aligned")
    rows: list[tuple[str, ...]] = [
        ("method", "refusals", "seeds", "pairs", "untrained", "after stage 1", "after stage 2")
    ]
    for method, share in itertools.product(METHODS, SHARES):
        kernels = [
            record["kernel"]
            for record in records
            if (record["cell"]["method"], record["cell"]["share"]) == (method, share) and "kernel" in record
        ]
        if kernels:
            values = [[x for kernel in kernels for x in kernel.get(name, []) if x is not None] for name in names]
            means = [f"{np.mean(found):.3f}" if found else "–" for found in values]
            rows.append((METHODS[method].title, f"{share:.0%}", str(len(kernels)), str(len(values[0])), *means))
    return _table(rows)


def kernel(records: Sequence[Mapping[str, Any]]) -> str:
    """Normalised kernel similarity of held-out pairs, before, between and after the stages."""
    rows = [("method", "seed", "stage", "pairs", "at its start", "at its end")]
    for record in sorted(records, key=lambda r: (r["cell"]["method"], r["cell"]["seed"], r["cell"]["share"])):
        for stage, ends in record["probe"].items():
            for kind in sorted(key for key in ends["first"] if key.startswith("kernel/") and "stderr" not in key):
                shown = [_with_error(ends[end][kind], ends[end][f"{kind}_stderr"]) for end in ("first", "last")]
                name = METHODS[record["cell"]["method"]].title
                rows.append((name, str(record["cell"]["seed"]), stage, kind.removeprefix("kernel/"), *shown))
    # All shares of a seed have one stage 1.
    return _table(list(dict.fromkeys(rows)))


def _with_error(value: float | None, error: float | None) -> str:
    """A dash where the estimates of the prompts' own kernels were not positive."""
    return "–" if value is None or error is None else f"{value:.3f} ± {error:.3f}"


def setting(records: Sequence[Mapping[str, Any]], suites: Mapping[str, Any]) -> str:
    """Where the numbers come from, in a sentence."""
    first = records[0]
    sizes = ", ".join(f"{name} {len(suite['ids'])}" for name, suite in suites.items())
    seconds = sum(record["seconds"]["cell"] * record["threads"] for record in records)
    libraries = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{len(records)} cells, {duration(seconds)} of one core in all, shared with other work: {first['device']} "
        f"({libraries}). "
        f"Prompts of the suites: {sizes}."
    )


def _middle_defence(lines: Mapping[str, Curve]) -> float:
    reached = np.sort(lines["stl"].rates("toxic"))
    return float(reached[len(reached) // 2])


def _seeds(ours: Curve, theirs: Curve) -> str:
    return str(len(paired(ours, theirs)[0].seeds))


def _range(ours: Curve, theirs: Curve) -> str:
    if not paired(ours, theirs)[0].seeds:
        return "no seed in common"
    low, high = common_defence(*paired(ours, theirs))
    return "none in common" if high < low else f"{low:.2f} … {high:.2f}" if high > low else f"{low:.2f}"


def _in_order(lines: Mapping[str, Curve]) -> list[tuple[str, Curve]]:
    return [(name, lines[name]) for name in METHODS if name in lines]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])
