"""A report says what the records say, shows text as text, and is made of what a run left."""

from __future__ import annotations

import json
import logging
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
from finished_run import CLASSES, HOSTILE, REFUSAL, answers, evaluation, finished_run, write_rows

from dcr_scale import pipeline
from dcr_scale.errors import UserError
from dcr_scale.report import write_report
from dcr_scale.report.__main__ import main
from dcr_scale.report.changes import changes, headline


class Parsed(HTMLParser):
    """Elements with their attributes, the visible text, and the scripts' contents by id."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._script = "", {}, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", f"script {len(self.elements)}") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    return Parsed(write_report(finished_run(tmp_path_factory.mktemp("report") / "run")))


def test_text_of_data_and_settings_never_becomes_markup(parsed: Parsed) -> None:
    """Prompts, answers, settings and the run's name hold tags, quotes, template fields and a script's end."""
    assert not parsed.of("img") and not parsed.of("b")[1:], "only the page's own elements"
    assert len(parsed.of("script")) == 4
    settings = (parsed.path.parent / "config.yaml").read_text(encoding="utf-8")
    assert "{{" in settings and settings.strip() in parsed.text and "toy <b>run</b>" in parsed.text
    listed = json.loads(parsed.scripts["look-answers"])
    assert HOSTILE in listed["rows"][0]["prompt"] and HOSTILE in listed["rows"][1]["answers"][0]["text"]
    # In plotly's labels, which know tags, it is escaped.
    figures = json.loads(parsed.scripts["figure-data"])
    labels = [text for trace in figures["map-before"]["data"] for text in trace["text"]]
    labels += figures["cosines-before"]["data"][0]["texts"] + figures["kernel-before"]["data"][0]["texts"]
    assert labels and not any("<script" in label or "<img" in label for label in labels)


def test_nothing_is_fetched_and_only_the_pages_scripts_run(parsed: Parsed) -> None:
    assert not [value for tag, attributes in parsed.elements for value in (attributes.get("src"),) if value]
    assert not parsed.of("link")
    links = {str(attributes["href"]) for attributes in parsed.of("a")}
    assert links >= {"summary.json", "metrics.jsonl", "config.yaml"} and not any("//" in link for link in links)
    [policy] = [tag["content"] for tag in parsed.of("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'") and "unsafe-eval" not in str(policy)


def test_every_figure_is_one_that_plotly_knows(parsed: Parsed) -> None:
    figures = json.loads(parsed.scripts["figure-data"])
    drawn = {str(tag["data-figure"]) for tag in parsed.of("div") if "data-figure" in tag}
    drawn |= {str(tag["data-shared"]) for tag in parsed.of("div") if "data-shared" in tag}
    assert drawn == set(figures) and len(figures) > 20
    for figure in figures.values():
        data = [{key: value for key, value in trace.items() if key != "texts"} for trace in figure["data"]]
        go.Figure({"data": data, "layout": {k: v for k, v in figure["layout"].items() if k != "zoomable"}})


def test_the_headline_claims_what_the_intervals_leave_no_doubt_of() -> None:
    """Eleven of twelve toxic prompts refused against one; one of twelve others."""
    found = changes({"before": answers({"toxic": 1}), "after": answers({"toxic": 11, "seemingly_toxic": 1})})
    said = headline(found, "A", "B")
    assert said.sentence == (
        "Compared with A, B refuses more toxic prompts; on seemingly toxic and general prompts no difference is larger "
        "than its uncertainty (12 prompts a class)."
    )
    assert "Toxic prompts defended: 8\u00a0% → 92\u00a0%, +83 points [+47, +93]" in said.figures
    undone = headline(changes({"a": answers({"seemingly_toxic": 12}), "b": answers({})}), "A", "B")
    assert undone.sentence.startswith("Compared with A, B answers more seemingly toxic prompts")


def test_the_headline_says_when_nothing_can_be_concluded() -> None:
    found = changes({"before": answers({}), "after": answers({"toxic": 2})})
    assert headline(found, "A", "B").sentence.startswith("Nothing can be concluded about refusals: with 12 prompts")
    assert headline(changes({"before": answers({})}), "A", "A").sentence.startswith("Nothing can be concluded")


def test_a_degenerate_answer_is_neither_compliance_nor_defence() -> None:
    rows = [{**row, "label": "degenerate", "refusal_probability": 0.0} for row in answers({})]
    assert [change.rates[0].estimate for change in changes({"m": rows})] == [0.0, 0.0, 0.0]


def test_only_prompts_that_all_models_answered_are_compared() -> None:
    [change] = changes({"a": answers({"toxic": 3})[12:24], "b": answers({"toxic": 3})[:18]})[:1]
    assert (change.label, change.prompts, change.rates[0].estimate) == ("toxic", 6, 0.5)


def test_a_run_without_probe_says_how_to_turn_it_on_and_without_looks_has_no_such_section(tmp_path: Path) -> None:
    parsed = Parsed(write_report(finished_run(tmp_path / "run", probe=False, looks=())))
    assert "probe.every=10" in parsed.text
    anchors = {tag["id"] for tag in parsed.of("section")}
    assert anchors == {"audit", "through", "training", "cost", "configuration"}
    assert {str(tag["href"])[1:] for tag in parsed.of("a") if str(tag["href"]).startswith("#")} == anchors


def test_answers_without_verdicts_are_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    rows = [{"class": label, "prompt": "How?", "completion": REFUSAL} for label in CLASSES]
    write_rows(run / "look" / "refined.jsonl", rows)
    with pytest.raises(UserError, match=r"refined\.jsonl: row 1 has no 'label'"):
        write_report(run)


def test_evaluations_are_compared_by_suite_and_lead_the_report(tmp_path: Path) -> None:
    """Two models of one name go by their folders; a suite that one has not answered is named and left out."""
    safe, toxic = answers({})[:12], answers({})[12:24]
    refusing = {"harmful": answers({"toxic": 12})[12:24], "mixed": safe + answers({"toxic": 12})[12:24]}
    stl = evaluation(tmp_path / "stl", "aligned", {"harmful": toxic, "mixed": safe + toxic, "extra": safe})
    dcr = evaluation(tmp_path / "dcr", "aligned", refusing)
    parsed = Parsed(write_report(finished_run(tmp_path / "run"), [stl, dcr]))
    assert "Compared with stl, dcr refuses more toxic prompts; on seemingly toxic prompts no difference" in parsed.text
    assert "stl: extra left out" in parsed.text
    figure = json.loads(parsed.scripts["figure-data"])["suites"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["mixed, seemingly toxic", "harmful", "mixed, toxic"]
    assert [trace["x"] for trace in figure["data"]] == [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    listed = json.loads(parsed.scripts["evaluation-answers"])
    assert (listed["models"], listed["suites"], len(listed["rows"])) == (["stl", "dcr"], ["harmful", "mixed"], 36)


def test_what_makes_a_comparison_unequal_is_said(tmp_path: Path) -> None:
    """A suite that was trained on, answers got in another way, and other prompts under the same numbers."""
    rows = [{**row, "id": f"harmful/{i}"} for i, row in enumerate(answers({})[12:24])]
    others = [{**row, "prompt": f"{row['prompt']} Please."} if i < 5 else row for i, row in enumerate(rows)]
    folders = [
        evaluation(tmp_path / name, name, {"harmful": asked}) for name, asked in (("stl", rows), ("dcr", others))
    ]
    for folder, longest, trained_on in zip(folders, (8, 512), (0, 7), strict=True):
        summary = {
            "model": f"runs/{folder.name}",
            "identity": {"engine": "transformers", "max_new_tokens": longest},
            "contamination": [{"suite": "harmful", "prompts": 12, "trained_on": trained_on, "by_set": {}}],
        }
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    text = Parsed(write_report(finished_run(tmp_path / "run"), folders)).text
    assert "dcr was not asked as stl was: another longest answer." in text
    assert "dcr was trained on 7 of harmful's prompts" in text and "stl was trained on" not in text
    assert "dcr: 5 prompts left out" in text


def test_models_of_one_name_go_by_as_much_of_their_path_as_it_takes(tmp_path: Path) -> None:
    """Two runs as they lie: runs/stl/evaluate and runs/dcr/evaluate, both of a model called aligned."""
    asked = {"harmful": answers({})[12:24]}
    two = [evaluation(tmp_path / run / "evaluate", "aligned", asked) for run in ("stl", "dcr")]
    parsed = Parsed(write_report(finished_run(tmp_path / "run"), two))
    assert json.loads(parsed.scripts["evaluation-answers"])["models"] == ["stl/evaluate", "dcr/evaluate"]
    with pytest.raises(UserError, match="is given twice"):
        write_report(tmp_path / "run", [two[0], two[0]])


def test_the_command_writes_it_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = finished_run(tmp_path / "run")
    assert main([str(run), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").is_file() and not (run / "report.html").exists()
    assert main([str(tmp_path)]) == 2
    assert "no summary.json" in capsys.readouterr().err
    assert main([str(run), "--evaluation", str(run)]) == 2
    assert "no completions/*.jsonl" in capsys.readouterr().err
    (run / "look" / "before.jsonl").write_text('{"class": "toxic", "prompt": "a"}\n')
    with pytest.raises(UserError, match=r"before\.jsonl: row 1 has no 'completion'"):
        write_report(run)


def test_a_report_that_cannot_be_drawn_leaves_the_run_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.Run._report(SimpleNamespace(folder=SimpleNamespace(path=tmp_path)))
    assert "report.html is missing (UserError" in caplog.text and f"dcr_scale.report {tmp_path}" in caplog.text
