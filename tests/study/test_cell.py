"""A cell trains, is judged and leaves a record; what is finished is kept; the page is written from records."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy import contrast_rows, general_rows, refusal_rows, toy_checkpoint, write_jsonl

from dcr_scale.config import load_config
from dcr_scale.errors import UserError
from dcr_scale.evaluation.suites import Class, SuitePrompt
from dcr_scale.study import command, document
from dcr_scale.study.cell import Study
from dcr_scale.study.data import StudyData
from dcr_scale.study.grid import Cell, first_grid, quick_grid, second_grid
from dcr_scale.study.methods import METHODS


def suite(name: str, of_class: Class, text: str, response: str = "") -> list[SuitePrompt]:
    return [SuitePrompt(f"{name}/{i}", text.format(i), of_class, "", "", response) for i in range(3)]


SUITES = {
    "harmless": suite("harmless", "seemingly_toxic", "How do I kill process number {}?"),
    "harmful": suite("harmful", "toxic", "How do I rob kiosk number {}?"),
    "plain": suite("plain", "general", "What is the {}th letter?", "It is easily counted."),
}


@pytest.fixture
def study(alone: None, tmp_path: Path) -> Study:
    model = toy_checkpoint(tmp_path / "model")
    small = [
        f"model.path={model}", "engine.precision=fp32", "look.enabled=false", "data.overlong=drop",
        "refine.layer=2", "refine.steps=2", "refine.batch_size=8", "refine.retention.weight=0",
        "align.examples=8", "align.epochs=1", "align.batch_size=4", "align.max_tokens=64",
    ]  # fmt: skip
    base = load_config(None, small)
    contrast = write_jsonl(tmp_path / "contrast.jsonl", contrast_rows())
    sources = {
        "general": [{"path": str(write_jsonl(tmp_path / "general.jsonl", general_rows()))}],
        "refusals": [{"path": str(write_jsonl(tmp_path / "refusals.jsonl", refusal_rows()))}],
    }
    recipes = {name: [{"path": str(contrast)}] for name in ("mixed", "matched", "paper", "without_general")}
    data = StudyData(recipes, **sources, suites=SUITES, published=False)
    return Study(base, data, tmp_path / "records", tmp_path / "work", max_new_tokens=4)


def test_a_cell_leaves_a_record_and_is_not_run_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(0, "dcr", 0.25)
    record = study.run(cell)
    assert record["cell"] == {"method": "dcr", "share": 0.25, "seed": 0}
    assert record["refine"]["updates"] == 2
    assert record["align"]["refusals"] == 2
    assert {name: len(found["labels"]) for name, found in record["suites"].items()} == dict.fromkeys(SUITES, 3)
    assert record["perplexity"]["examples"] == 3
    text = study.record(cell).read_text(encoding="utf-8")
    assert not any(prompt.text in text for prompts in SUITES.values() for prompt in prompts), "no prompt in a record"

    monkeypatch.setattr("dcr_scale.study.cell.run", lambda config: pytest.fail("trained again"))
    assert study.run(cell) == json.loads(text)


def test_cells_of_one_seed_share_stage_1(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stage 1 serves all shares; stage 2 begins with its checkpoint."""
    from dcr_scale import pipeline

    stages: list[tuple[bool, str]] = []

    def counted(config):
        stages.append((config.refine is not None, config.model.path))
        return pipeline.run(config)

    monkeypatch.setattr("dcr_scale.study.cell.run", counted)
    for share in (0.25, 0.5):
        study.run(Cell(1, "dcr", share))
    assert [first for first, _ in stages] == [True, False, False]
    assert all(path.endswith("refined") for first, path in stages if not first)


def test_kernel_similarity_is_measured_at_one_share(study: Study) -> None:
    """Held-out pairs, at the ends of both stages; other shares train without the probe."""
    study.base.probe = replace(study.base.probe, pairs=2, prompts=2, rank=2, groups=2, output_probes=2)
    record = study.run(Cell(0, "dcr", 0.5))
    assert set(record["probe"]) == {"refine", "align"}
    assert record["probe"]["refine"]["last"]["step"] == 2
    assert "align" not in study.run(Cell(0, "dcr", 0.25))["probe"]
    found = document.kernel([record])
    assert found.count("cross") == 2, "one line a stage"


def test_the_page_is_written_from_records(study: Study, tmp_path: Path) -> None:
    for method in ("stl", "dcr"):
        for share in (0.25, 0.5):
            study.run(Cell(0, method, share))
    command._write_suites(study)
    page = tmp_path / "study.md"
    names = ("comparison", "points", "suites", "cost", "failures", "kernel", "setting")
    page.write_text("# Words\n" + "".join(f"<!-- study:{n} -->\nold\n<!-- /study:{n} -->\n" for n in names))
    table = document.write(study.records, page)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and "# Words" in text
    assert table in text
    assert (tmp_path / "pictures" / "study_trade_off.png").read_bytes().startswith(b"\x89PNG")
    assert text == document.filled(text, {}), "blocks stay where they are"

    page.write_text("nothing to fill")
    with pytest.raises(UserError, match="has no block"):
        document.write(study.records, page)


def test_records_of_other_prompts_are_not_mixed(study: Study) -> None:
    command._write_suites(study)
    other = replace(study, data=replace(study.data, suites={"harmless": SUITES["harmless"][:2]}))
    with pytest.raises(UserError, match="of other prompts"):
        command._write_suites(other)


def test_the_grids() -> None:
    first = first_grid()
    assert len(first) == len(set(first)) == 36
    assert {cell.method for cell in [*first, *second_grid()]} == set(METHODS)
    assert set(quick_grid()) < set(first)
    assert {command.cell_named(cell.name) for cell in first} == set(first)


def test_cells_run_side_by_side_and_a_failed_one_is_named(study: Study, tmp_path: Path) -> None:
    """What others have finished stays; the same call goes on with what is left."""
    script = tmp_path / "cell.py"
    script.write_text(
        "import pathlib, sys\n"
        f"sys.exit(3) if sys.argv[1].startswith('scans') else (pathlib.Path({str(study.records)!r}) / "
        "f'{sys.argv[1]}.json').write_text('{}')\n"
    )
    cells = [Cell(0, "stl", 0.25), Cell(0, "dcr", 0.25), Cell(0, "scans", 0.25)]
    with pytest.raises(UserError, match=r"cell scans_share25_seed0 failed; see .*scans_share25_seed0\.log"):
        command.run_cells(study, cells, [sys.executable, str(script)], jobs=2)
    assert command.pending(study, cells) == cells[2:]
