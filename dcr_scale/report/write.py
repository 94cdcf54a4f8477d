"""Puts the report together: the records into sections, the sections into one HTML file.

All text goes through the template's escaping, or as JSON into the page, whose script sets it as text. The page's
content security policy names its scripts by their hashes: nothing else runs, and nothing is fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from dcr_scale.report.changes import NAMES
from dcr_scale.report.figures import Figure
from dcr_scale.report.maps import SCALE
from dcr_scale.report.records import read_evaluation, read_run
from dcr_scale.report.sections import MARKS, Page, compose


def write_report(folder: Path, evaluations: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write a finished run's report and return its path.

    Args:
        folder: the run's folder.
        evaluations: output folders of launchers/evaluate.py, in the order in which their models are compared.
        out: where to write; None: ``report.html`` in the run's folder.

    Raises UserError where a folder does not hold what the report is made of.
    """
    page = compose(read_run(folder), [read_evaluation(path) for path in evaluations])
    path = out or folder / "report.html"
    text = render(page)
    # Written beside and moved: a reader never sees half a report.
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    assets = resources.files("dcr_scale.report") / "assets"
    script, style = ((assets / name).read_text(encoding="utf-8") for name in ("page.js", "style.css"))
    plotly = get_plotlyjs()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((assets / "page.html").read_text(encoding="utf-8"))
    figures = {figure.name: figure.as_dict() for figure in _all_views(page.figures)}
    blocks = {"figure-data": embedded(figures)} | {name: embedded(data) for name, data in page.answers.items()}
    return template.render(
        **page.context,
        blocks=blocks,
        names=NAMES,
        marks=MARKS,
        shades=", ".join(SCALE),
        style=style,
        script=script,
        plotly=plotly,
        policy="default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src {_hash(plotly)} {_hash(script)}",
    )


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it closes one, or opens a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _all_views(figures: Sequence[Figure]) -> list[Figure]:
    return [shown for figure in figures for shown in (figure, *figure.views.values())]


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
