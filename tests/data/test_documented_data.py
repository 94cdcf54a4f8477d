"""docs/data.md shows sources and rows: they are what a configuration and the readers take."""

from __future__ import annotations

import json
import re
from pathlib import Path

from toy import REPOSITORY, write_jsonl

from dcr_scale.config import ContrastSource, Source, load_config
from dcr_scale.data.sources import Kind, read_rows

PAGE = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")


def fenced(language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return block


def test_the_sources_are_a_configuration_s(tmp_path: Path) -> None:
    path = tmp_path / "documented.yaml"
    path.write_text(fenced("yaml") + "align: {answered_share: 0.1}\n", encoding="utf-8")
    data = load_config(path, []).data
    assert [source.path for source in data.contrast] == ["pairs.jsonl", "jailbreaks.csv", "general", "hub:Paul/XSTest"]
    assert data.contrast[-1].labels == {"safe": "seemingly_toxic", "unsafe": "toxic"}


def test_the_rows_are_read(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = ("contrast", "general", "refusals")
    for kind, line in zip(kinds, fenced("json").splitlines(), strict=True):
        path = str(write_jsonl(tmp_path / f"{kind}.jsonl", [json.loads(line)]))
        source = ContrastSource(path=path) if kind == "contrast" else Source(path=path)
        (row,) = read_rows(source, kind=kind)
        assert row.values["prompt"] and row.values["label" if kind == "contrast" else "response"]
