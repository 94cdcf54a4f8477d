"""docs/study.md's tables and pictures, from the records alone.

The page's words are written by hand; what stands between ``<!-- study:NAME -->`` and ``<!-- /study:NAME -->`` is
replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcr_scale.errors import UserError
from dcr_scale.evaluation.intervals import Interval
from dcr_scale.runlog import duration
from dcr_scale.study import pictures
from dcr_scale.study.analysis import Curve, curves, rate, ratio
from dcr_scale.study.command import read_records
from dcr_scale.study.methods import METHODS


def write(records: Path, page: Path | None) -> str:
    """Bring the page's blocks and pictures up to date, and return its first table. None: only the table."""
    found, suites = read_records(records)
    classes = {name: suite["class"] for name, suite in suites.items()}
    lines = curves(found, classes)
    if "stl" not in lines:
        raise UserError(f"{records}: no seed of STL has all its shares yet; there is nothing to compare with")
    headline = comparison(lines)
    if page is not None:
        folder = page.parent / "pictures"
        folder.mkdir(exist_ok=True)
        pictures.trade_off(folder / "study_trade_off.png", lines)
        blocks = {
            "comparison": headline,
            "points": points(lines),
            "suites": by_suite(lines),
            "cost": cost(found),
            "failures": failures(lines, suites),
            "kernel": kernel(found),
            "setting": setting(found, suites),
        }
        page.write_text(filled(page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    return headline


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


def comparison(lines: Mapping[str, Curve]) -> str:
    """Every method against STL where they defend equally well."""
    rows: list[tuple[str, ...]] = [("method", "seeds", "seemingly toxic, × STL", "general, × STL", "at defence")]
    stl = lines["stl"]
    for name, line in _in_order(lines):
        if name == "stl":
            continue
        low, high = _common(line, stl)
        rows.append(
            (
                METHODS[name].title,
                str(line.seeds),
                _shown(ratio(line, stl)),
                _shown(ratio(line, stl, "general")),
                f"{low:.2f} … {high:.2f}" if high > low else "none in common",
            )
        )
    return _table(rows)


def points(lines: Mapping[str, Curve]) -> str:
    """Each model of each method as a point."""
    rows: list[tuple[str, ...]] = [
        ("method", "refusals in stage 2", "defence success", "refused, seemingly toxic", "refused, general")
    ]
    for name, line in _in_order(lines):
        for at, share in enumerate(line.shares):
            rates = [_shown(rate(line, of, at)) for of in ("toxic", "seemingly_toxic", "general")]
            rows.append((METHODS[name].title, f"{share:.0%}", *rates))
    return _table(rows)


def by_suite(lines: Mapping[str, Curve]) -> str:
    """Refusal rate of each suite, DCR beside STL, where both defend as STL does at its middle share."""
    stl = lines["stl"]
    middle = len(stl.shares) // 2
    rows = [("suite", "class", *(f"{METHODS[name].title}" for name, _ in _in_order(lines)))]
    for suite, of_class in stl.classes.items():
        cells = []
        for _, line in _in_order(lines):
            order = np.argsort(line.rates("toxic"), kind="stable")
            reached, refused = line.rates("toxic")[order], line.suite(suite)[order]
            value = np.interp(stl.rates("toxic")[middle], reached, refused, left=np.nan, right=np.nan)
            cells.append("–" if np.isnan(value) else f"{value:.2f}")
        rows.append((suite, of_class.replace("_", " "), *cells))
    return _table(rows)


def cost(records: Sequence[Mapping[str, Any]]) -> str:
    """Core-minutes and updates of the stages, medians over cells."""
    rows = [("method", "cells", "stage 1, core-minutes", "stage 2", "judging", "stage 1 updates", "perplexity")]
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_method.setdefault(record["cell"]["method"], []).append(record)
    for name in METHODS:
        cells = by_method.get(name, [])
        if cells:
            refine = [c["seconds"]["refine"] * c["threads"] for c in cells if "refine" in c["seconds"]]
            updates = [c["refine"]["updates"] for c in cells if "refine" in c]
            perplexity = [c["perplexity"]["estimate"] for c in cells]
            rows.append(
                (
                    METHODS[name].title,
                    str(len(cells)),
                    f"{np.median(refine) / 60:.1f}" if refine else "–",
                    f"{np.median([c['seconds']['align'] * c['threads'] for c in cells]) / 60:.1f}",
                    f"{np.median([c['seconds']['judge'] * c['threads'] for c in cells]) / 60:.1f}",
                    f"{np.median(updates):.0f}" if updates else "–",
                    f"{np.median(perplexity):.2f}",
                )
            )
    return _table(rows)


def failures(lines: Mapping[str, Curve], suites: Mapping[str, Any]) -> str:
    """What DCR still gets wrong: categories of the middle share's models, most often wrong first."""
    rows = [("suite", "category", "wrong", "of", "STL's", "some ids")]
    if "dcr" not in lines:
        return _table(rows)
    ours, stl = lines["dcr"], lines["stl"]
    middle = len(ours.shares) // 2
    for suite, of_class in ours.classes.items():
        if of_class == "general":
            continue
        wrong_of = {
            name: (line.refused[suite][:, middle] != (of_class == "toxic")).mean(axis=0)
            for name, line in (("dcr", ours), ("stl", stl))
        }
        named = suites[suite]["categories"]
        counts = Counter({c: wrong_of["dcr"][[n == c for n in named]].sum() for c in set(named)})
        for category, wrong in counts.most_common(3):
            members = [i for i, name in enumerate(named) if name == category]
            worst = sorted(members, key=lambda i: -wrong_of["dcr"][i])[:3]
            ids = ", ".join(suites[suite]["ids"][i].split("/")[1] for i in worst if wrong_of["dcr"][i] > 0)
            theirs = wrong_of["stl"][members].sum()
            rows.append((suite, category or "–", f"{wrong:.1f}", str(len(members)), f"{theirs:.1f}", ids))
    return _table(rows)


def kernel(records: Sequence[Mapping[str, Any]]) -> str:
    """Normalised kernel similarity of held-out pairs, before, between and after the stages."""
    rows = [("method", "seed", "stage", "pairs", "at its start", "at its end")]
    for record in sorted(records, key=lambda r: (r["cell"]["method"], r["cell"]["seed"], r["cell"]["share"])):
        for stage, ends in record["probe"].items():
            for kind in sorted(key for key in ends["first"] if key.startswith("kernel/") and "stderr" not in key):
                shown = [f"{ends[end][kind]:.3f} ± {ends[end][f'{kind}_stderr']:.3f}" for end in ("first", "last")]
                name = METHODS[record["cell"]["method"]].title
                rows.append((name, str(record["cell"]["seed"]), stage, kind.removeprefix("kernel/"), *shown))
    # All shares of a seed have one stage 1.
    return _table(list(dict.fromkeys(rows)))


def setting(records: Sequence[Mapping[str, Any]], suites: Mapping[str, Any]) -> str:
    """Where the numbers come from, in a sentence."""
    first = records[0]
    sizes = ", ".join(f"{name} {len(suite['ids'])}" for name, suite in suites.items())
    seconds = sum(record["seconds"]["cell"] * record["threads"] for record in records)
    libraries = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{len(records)} cells, {duration(seconds)} on a core each, shared with other work, of {first['device']} "
        f"({libraries}). "
        f"Prompts of the suites: {sizes}."
    )


def _common(ours: Curve, theirs: Curve) -> tuple[float, float]:
    reached = [line.rates("toxic") for line in (ours, theirs)]
    return max(r.min() for r in reached), min(r.max() for r in reached)


def _in_order(lines: Mapping[str, Curve]) -> list[tuple[str, Curve]]:
    return [(name, lines[name]) for name in METHODS if name in lines]


def _shown(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])
