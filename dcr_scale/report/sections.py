"""The report's sections: what each says and shows of a run. A section that a run has nothing for is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from dcr_scale.evaluation.intervals import Interval
from dcr_scale.evaluation.suites import CLASSES
from dcr_scale.report import curves, figures, maps
from dcr_scale.report.benchmarks import benchmarks
from dcr_scale.report.changes import NAMES, Change, changes, headline, percent, points, side_by_side
from dcr_scale.report.figures import Figure
from dcr_scale.report.records import Evaluation, RunRecord
from dcr_scale.runlog import duration

MARKS = {"seemingly_toxic": "●", "toxic": "◆", "general": "■"}
MODELS = {"before": "the original", "refined": "refined", "aligned": "aligned"}
_PARTS = {
    "answers": "the model's own answers",
    "layer_choice": "choice of ℓ",
    "look_before": "look at the original",
    "refine": "stage 1: refinement",
    "look_refined": "look at the refined",
    "align": "stage 2: alignment",
    "look_aligned": "look at the aligned",
}


@dataclass
class Page:
    """What the template gets: its ``context``, all figures, and by the name of their place the answers listed."""

    context: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def show(self, found: Sequence[Figure | None]) -> list[Figure]:
        """Those figures that there are, drawn on this page."""
        shown = [figure for figure in found if figure is not None]
        self.figures += shown
        return shown


def compose(run: RunRecord, evaluations: Sequence[Evaluation]) -> Page:
    """The whole report of a run and, where there are any, of evaluations of it and of what it is compared with."""
    found = changes(run.answers)
    page = Page({})
    context = {
        **_top(run, found, evaluations),
        "evaluation": _benchmarks(page, evaluations),
        "looks": _looks(page, run, found),
        "audit": _audit(run.summary.get("audit")),
        "probe": _probe(page, run),
        "maps": _maps(page, run.activations),
        "kernels": _kernels(page, run.kernels),
        "tokens": run.settings["look"]["max_new_tokens"],
        "stages": _stages(run),
        "curves": _curves(page, run),
        "cosines": bool(run.rows("refine/heldout")),
        "cost": _cost(page, run),
        "machine": _machine(run),
        "links": _links(run),
        "settings": run.settings_text,
        "versions": _versions(run),
    }
    page.context = {**context, "sections": _contents(context)}
    return page


def _contents(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    titles = [
        ("benchmarks", "Benchmarks", "evaluation"),
        ("refusals", "Compliance", "looks"),
        ("audit", "Audit", "audit"),
        ("through", "While it trained", "curves"),
        ("map", "Activations", "maps"),
        ("kernel", "Kernel", "kernels"),
        ("answers", "Answers", "looks"),
        ("training", "Training", "curves"),
        ("cost", "Cost", "cost"),
        ("configuration", "Configuration", "settings"),
    ]
    return [(anchor, title) for anchor, title, needed in titles if context[needed]]


# --- the top -------------------------------------------------------------------------------------------------------


def _top(run: RunRecord, found: Sequence[Change], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    refine, align = run.settings["refine"], run.settings["align"]
    method = "refinement and safety alignment (DCR)" if refine and align else "refinement alone"
    if not refine:
        method = "safety alignment without refinement (STL)"
    first, last = (MODELS[name] for name in (list(run.answers)[:1] + list(run.answers)[-1:] or ["before", "before"]))
    said = headline(found, f"{first} model", f"the {last} one")
    if len(evaluations) > 1:
        said = benchmarks(evaluations).headline
    return {
        "run": run.summary["run"],
        "model": run.summary["model"].rstrip("/").rpartition("/")[2],
        "method": method,
        "headline": said,
        "tiles": _tiles(run, found),
    }


def _tiles(run: RunRecord, found: Sequence[Change]) -> list[dict[str, str]]:
    titles = {"seemingly_toxic": "Seemingly toxic, complied with", "toxic": "Toxic, defended"}
    tiles = [
        {
            "title": titles[change.label],
            "before": percent(change.rates[0].estimate) if change.difference else "",
            "after": percent(change.rates[-1].estimate),
            "note": f"{change.prompts} prompts" + (f", {_span(change.difference)} points" if change.difference else ""),
        }
        for change in found
        if change.label in titles
    ]
    looks = list(run.summary["look"].values())
    if looks:
        pairs = [
            ("Cosine across the classes", "cross", lambda look: look["cosine"]["cross"], ".2f"),
            ("Perplexity of general answers", "", lambda look: look["perplexity"], ".1f"),
        ]
        for title, _, value, form in pairs:
            values = [value(looks[0]), value(looks[-1])]
            if None not in values:
                note = f"held-out prompts, layer {looks[0]['layer']}" if "Cosine" in title else "held-out answers"
                before = format(values[0], form) if len(looks) > 1 else ""
                tiles.append({"title": title, "before": before, "after": format(values[1], form), "note": note})
    return tiles


# --- refusals ------------------------------------------------------------------------------------------------------


def _benchmarks(page: Page, evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    found = benchmarks(evaluations)
    page.show([found.figure])
    page.answers["evaluation-answers"] = found.answers
    return {
        "warnings": found.warnings,
        "table": found.table,
        "marks": found.marks,
        "labels": found.labels,
        "figure": found.figure,
        "answers": found.answers,
    }


def _looks(page: Page, run: RunRecord, found: Sequence[Change]) -> dict[str, Any] | None:
    if not found:
        return None
    names = list(run.answers)
    (figure,) = page.show([figures.rates(found, names)])
    answers = side_by_side(run.answers)
    page.answers["look-answers"] = answers
    return {
        "table": _rate_table(run, found, names),
        "figure": figure,
        "labels": [change.label for change in found],
        "answers": answers,
    }


def _rate_table(run: RunRecord, found: Sequence[Change], names: Sequence[str]) -> dict[str, Any]:
    compared = len(names) > 1
    rows = []
    for change in found:
        cells = [rate_cell(rate) for rate in change.rates]
        cells += [(points(change.difference.estimate), f"[{_span(change.difference)}]")] if change.difference else []
        note = f"{change.prompts} prompts"
        rows.append({"kind": change.label, "title": _outcome(change.label), "note": note, "cells": cells})
    looks = run.summary["look"]
    for change in found:
        opening = [looks[name].get("refusal_rate_by_opening", {}).get(change.label) for name in names]
        if None not in opening:
            title = f"{NAMES[change.label]}, opens like a refusal"
            cells = [(percent(rate), "") for rate in opening] + [("", "")] * compared
            rows.append({"kind": "", "title": title, "note": "by phrases", "cells": cells})
    if any(any(change.degenerate) for change in found):
        for change in found:
            cells = [(percent(share), "") for share in change.degenerate] + [("", "")] * compared
            rows.append({"kind": "", "title": f"{NAMES[change.label]}, degenerate", "note": "", "cells": cells})
    columns = [*names, *(["change, points"] if compared else [])]
    return {"corner": "held-out prompts, 95 % intervals", "columns": columns, "rows": rows}


def rate_cell(rate: Interval) -> tuple[str, str]:
    return percent(rate.estimate), f"[{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _outcome(label: str) -> str:
    return f"{NAMES[label]}, {'defended' if label == 'toxic' else 'complied with'}"


def _span(interval: Interval) -> str:
    return f"{points(interval.low)} to {points(interval.high)}"


def _audit(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    rows = [
        {"kind": "", "title": f"by {name}", "note": "families not fitted on", "cells": [_area(area)]}
        for name, area in found["within"].items()
    ]
    rows += [
        {"kind": "", "title": f"on {name}", "note": "fitted on the other sources", "cells": [_area(area)]}
        for name, area in found["across"].items()
    ]
    verdict = found["verdict"].removeprefix("shortcut audit: ")
    return {
        "verdict": f"{verdict[:1].upper()}{verdict[1:]}.",
        "warnings": found["warnings"],
        "table": {"corner": "told apart", "columns": ["area under the ROC; .5 is chance"], "rows": rows},
        "facts": "; ".join(found["facts"]) + ".",
    }


def _area(area: Mapping[str, float]) -> tuple[str, str]:
    return f"{area['estimate']:.2f}", f"[{area['low']:.2f}, {area['high']:.2f}]"


# --- what moves, and where prompts lie -----------------------------------------------------------------------------


def _probe(page: Page, run: RunRecord) -> list[Figure]:
    asked: dict[str, tuple[str, ...]] = {label: (NAMES[label], label, figures.SYMBOLS[label]) for label in CLASSES}
    return page.show(
        [
            curves.probe_curves(run, "refusal-probability", "Refusal probability", "refusal_probability", asked),
            curves.probe_curves(run, "kernel-similarity", "Kernel similarity", "kernel", curves.KINDS),
        ]
    )


def _maps(page: Page, activations: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if activations is None:
        return None
    cosines, scale = maps.cosine_maps(activations)
    prompts = activations["prompts"]
    return {
        "points": page.show(maps.activation_maps(activations)),
        "cosines": page.show(cosines),
        "scale": [f"{end:.1f}" for end in scale],
        "cells": len(activations["cells"]),
        "layer": activations["layer"],
        "pooling": {"last": "last token's", "mean": "mean"}[activations["pooling"]],
        "sources": maps.source_marks(activations),
        "labels": [label for label in CLASSES if any(prompt["label"] == label for prompt in prompts)],
    }


def _kernels(page: Page, kernels: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if kernels is None:
        return None
    shown, scale = maps.kernel_maps(kernels)
    return {"figures": page.show(shown), "scale": ["0", f"{scale[1]:.2g}"]}


# --- training and its cost -----------------------------------------------------------------------------------------


def _stages(run: RunRecord) -> list[str]:
    lines = []
    if refine := run.summary.get("refine"):
        before, after = refine["heldout_before"]["cross"], refine["heldout_after"]["cross"]
        lines.append(
            f"Stage 1 ended after {refine['updates']} updates: {refine['ended']}. The held-out cosine across the "
            f"classes went from {before:.3f} to {after:.3f}."
        )
    if align := run.summary.get("align"):
        lines.append(
            f"Stage 2: {align['updates']} updates on {align['examples']} examples, {align['refusals']} of them "
            f"refusals. The loss went from {align['first_loss']:.3f} to {align['last_loss']:.3f}, means over its first "
            "and last tenth."
        )
    return lines


def _curves(page: Page, run: RunRecord) -> list[Figure]:
    both = ("refine", "align")
    return page.show(
        [
            curves.curve(run, "loss-1", "Contrastive loss, stage 1", "loss", ["refine"]),
            curves.heldout_cosines(run),
            curves.curve(run, "retention", "Retention term, stage 1", "retention", ["refine"]),
            curves.curve(run, "loss-2", "Loss per response token, stage 2", "loss", ["align"]),
            curves.curve(run, "rehearsal", "Rehearsal term, stage 2", "rehearsal", ["align"]),
            curves.curve(run, "gradient", "Gradient norm", "grad_norm", both, rangemode="tozero"),
            curves.curve(run, "rate", "Learning rate", "lr", both, rangemode="tozero", exponentformat="power"),
        ]
    )


def _cost(page: Page, run: RunRecord) -> dict[str, Any]:
    memory = run.summary.get("memory_gib", {})
    rows = []
    for part, seconds in run.summary["seconds"].items():
        rates = [row["tokens_per_second"] for row in run.rows(part) if row.get("tokens_per_second")]
        cells = [
            (duration(seconds), ""),
            (f"{median(rates):,.0f}" if rates else "", ""),
            (f"{memory[part]:.1f}" if part in memory else "", ""),
        ]
        rows.append({"kind": "", "title": _PARTS.get(part, part), "note": "", "cells": cells})
    total = [(duration(sum(run.summary["seconds"].values())), ""), ("", "")]
    rows.append(
        {"kind": "", "title": "all", "note": "", "cells": [*total, (f"{run.summary['peak_memory_gib']:.1f}", "")]}
    )
    columns = ["time", "tokens a second, median", "peak memory so far, GiB a rank"]
    both = ("refine", "align")
    return {
        "table": {"corner": "part of the run", "columns": columns, "rows": rows},
        "curves": page.show(
            [
                curves.curve(
                    run, "throughput", "Tokens a second, all ranks", "tokens_per_second", both, rangemode="tozero"
                ),
                curves.curve(run, "memory", "Peak memory so far, GiB a rank", "memory_gib", both, rangemode="tozero"),
            ]
        ),
    }


def _machine(run: RunRecord) -> str:
    summary = run.summary
    return f"{summary['parameters']:,} parameters on {summary['world_size']} × {summary['device']}."


def _links(run: RunRecord) -> list[tuple[str, str]]:
    """What lies beside the report, by relative paths."""
    known = {
        "refined/README.md": "model card: refined",
        "aligned/README.md": "model card: aligned",
        "summary.json": "summary.json",
        "metrics.jsonl": "metrics.jsonl",
        "config.yaml": "config.yaml",
    }
    return [(path, title) for path, title in known.items() if (run.folder / path).is_file()]


def _versions(run: RunRecord) -> str:
    versions = {**run.summary["versions"], "Python": run.summary["python"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items())
