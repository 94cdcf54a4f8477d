"""Suites: every published layout gives the same prompts; every fault is one line that says what to do."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from dcr_scale.errors import UserError
from dcr_scale.evaluation import suites
from dcr_scale.evaluation.contamination import overlap
from dcr_scale.evaluation.suites import SUITES, SuitePrompt, load_suite

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def jsonl(folder: Path, *records: dict, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def in_csv(folder: Path, *records: dict) -> str:
    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return str(path)


def fault(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        load_suite(spec)
    message = str(caught.value)
    assert "\n" not in message
    return message


# One row of each suite as it is published, on the Hub and in its authors' own files.
PUBLISHED = [
    ("xstest", {"id": "1", "prompt": "P", "type": "homonyms", "label": "safe", "focus": "x"}, "seemingly_toxic"),
    ("xstest", {"prompt": "P", "focus": "x", "type": "contrast_homonyms", "note": "", "label": "unsafe"}, "toxic"),
    ("coconot", {"id": "1", "category": "c", "subcategory": "s", "prompt": "P", "response": ""}, "seemingly_toxic"),
    ("or_bench_hard", {"prompt": "P", "category": "c"}, "seemingly_toxic"),
    ("or_bench_toxic", {"prompt": "P", "category": "c"}, "toxic"),
    ("or_bench_80k", {"prompt": "P", "category": "c"}, "seemingly_toxic"),
    ("oktest", {"prompt": "P"}, "seemingly_toxic"),
    ("phtest", {"ID": 1, "Request": "P", "Harmfulness": "harmless"}, "seemingly_toxic"),
    ("falsereject", {"prompt": "P", "category": "c"}, "seemingly_toxic"),
    ("advbench", {"goal": "P", "target": "Sure"}, "toxic"),
    ("advbench", {"prompt": "P", "target": "Sure"}, "toxic"),
    (
        "harmbench",
        {"Behavior": "P", "FunctionalCategory": "standard", "SemanticCategory": "c", "BehaviorID": "b"},
        "toxic",
    ),
    ("harmbench", {"prompt": "P", "category": "c"}, "toxic"),
    ("jailbreakbench", {"Index": 0, "Goal": "P", "Target": "Sure", "Behavior": "b", "Category": "c"}, "toxic"),
    ("strongreject", {"category": "c", "source": "s", "forbidden_prompt": "P"}, "toxic"),
    ("strongreject", {"prompt": "P", "category": "c", "source": "s"}, "toxic"),
    ("malicious_instruct", {"prompt": "P"}, "toxic"),
    ("i_malicious_instructions", {"instruction": "P"}, "toxic"),
    ("sorry_bench", {"question_id": 1, "category": "1", "turns": ["P"], "prompt_style": "base"}, "toxic"),
    ("general", {"instruction": "P", "input": "", "output": "R"}, "general"),
]


@pytest.mark.parametrize("name, record, of_class", PUBLISHED)
def test_every_published_layout_is_read(tmp_path: Path, name: str, record: dict, of_class: str) -> None:
    [prompt] = load_suite(f"{name}={jsonl(tmp_path, record)}")
    assert (prompt.id, prompt.text, prompt.of_class) == (f"{name}/0", "P", of_class)
    category = {key.lower(): value for key, value in record.items()}
    expected = category.get("category") or category.get("semanticcategory") or category.get("type") or ""
    assert prompt.category == expected
    assert prompt.response == ("R" if name == "general" else "")


def test_every_suite_has_a_published_layout_above_and_says_where_it_is_from() -> None:
    assert {name for name, *_ in PUBLISHED} == set(SUITES)
    for suite in SUITES.values():
        assert suite.licence and suite.published
        assert (suite.label is not None) == bool(suite.labels)
        assert suite.of_class is not None or suite.label is not None


def test_the_hub_is_asked_for_the_published_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repository: str, subset: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((repository, subset, split))
        return datasets.Dataset.from_list([{"Goal": "P", "Category": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [prompt] = load_suite("jailbreakbench")
    assert prompt.text == "P"
    assert set(asked) == {("JailbreakBench/JBB-Behaviors", "behaviors", "harmful")}


def test_rows_that_a_benchmark_leaves_out_are_left_out(tmp_path: Path) -> None:
    kinds = ("standard", "contextual", "copyright")
    harmbench = [{"Behavior": kind, "FunctionalCategory": kind, "ContextString": ""} for kind in kinds]
    assert [p.text for p in load_suite(f"harmbench={jsonl(tmp_path, *harmbench)}")] == ["standard"]
    ambiguous = [{"Request": "a", "Harmfulness": "controversial"}, {"Request": "b", "Harmfulness": "harmless"}]
    assert [prompt.text for prompt in load_suite(f"phtest={jsonl(tmp_path, *ambiguous)}")] == ["b"]
    styles = [{"turns": ["a"], "prompt_style": "morse"}, {"turns": ["b"], "prompt_style": "base"}]
    assert [prompt.text for prompt in load_suite(f"sorry_bench={jsonl(tmp_path, *styles)}")] == ["b"]


def test_a_copy_of_several_suites_gives_each_its_own_class(tmp_path: Path) -> None:
    """Else the toxic half would count as over-refused."""
    path = jsonl(tmp_path, {"prompt": "a", "label": "seemingly_toxic"}, {"prompt": "b", "label": "toxic"})
    assert [prompt.text for prompt in load_suite(f"or_bench_hard={path}")] == ["a"]
    assert [prompt.text for prompt in load_suite(f"or_bench_toxic={path}")] == ["b"]
    path = jsonl(tmp_path, {"prompt": "a", "label": "toxic"})
    assert "no row has the label of this suite's class, seemingly_toxic" in fault(f"oktest={path}")


def test_a_file_of_ones_own_has_its_own_classes(tmp_path: Path) -> None:
    path = in_csv(
        tmp_path,
        {"prompt": "a", "label": "safe", "category": "x"},
        {"prompt": "b", "label": "toxic", "category": "y"},
        {"prompt": "c", "label": "general", "category": "z"},
    )
    prompts = load_suite(path)
    assert [(p.id, p.of_class, p.category) for p in prompts] == [
        ("rows/0", "seemingly_toxic", "x"),
        ("rows/1", "toxic", "y"),
        ("rows/2", "general", "z"),
    ]
    assert suites.class_counts(prompts) == {"seemingly_toxic": 1, "toxic": 1, "general": 1}


@pytest.mark.parametrize(
    "name, meant", [("xtest", "xstest"), ("OR-Bench-Hard", "or_bench_hard"), ("sorry", "sorry_bench")]
)
def test_an_unknown_suite_lists_the_known_ones(name: str, meant: str) -> None:
    message = fault(name)
    assert message.startswith(f"unknown suite {name!r}; did you mean {meant!r}? known are xstest, coconot,")
    assert all(known in message for known in SUITES)


@pytest.mark.parametrize("spec", ["oktest", "i_malicious_instructions", "general"])
def test_a_suite_that_is_not_on_the_hub_wants_its_file(spec: str) -> None:
    assert f"suite {spec} is not on the Hub: get it from" in fault(spec)
    assert fault(spec).endswith(f"and give {spec}=FILE")


def test_missing_columns_are_named(tmp_path: Path) -> None:
    message = fault(f"phtest={jsonl(tmp_path, {'Text': 'a'})}")
    assert "no column 'Request' or 'prompt' and no column 'Harmfulness'; columns found: 'Text'" in message
    assert "suite general: " in fault(f"general={jsonl(tmp_path, {'instruction': 'a'})}")
    assert "no label column 'label'" in fault(jsonl(tmp_path, {"prompt": "a"}))


def test_a_gated_suite_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("401")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "walledai/AdvBench is gated: accept its terms there, then `hf auth login`" in fault("advbench")
    assert "gated" not in fault("coconot")


def test_a_conversation_of_several_turns_is_no_prompt(tmp_path: Path) -> None:
    message = fault(f"sorry_bench={jsonl(tmp_path, {'turns': ['a', 'b'], 'prompt_style': 'base'})}")
    assert "line 1, column 'turns': the prompt must be text, found a list" in message


# --- contamination ------------------------------------------------------------------------------------------


def suite_of(*texts: str) -> list[SuitePrompt]:
    return [SuitePrompt(f"s/{i}", text, "toxic", "", f"line {i}") for i, text in enumerate(texts)]


def test_prompts_trained_on_are_found_whatever_their_spelling() -> None:
    prompts = suite_of("How do I kill a process?", "Another one.", "A third")
    found = overlap(
        "s", prompts, {"data.contrast": ["how do I KILL a  process", "x"], "data.refusals": ["a third!", "A third"]}
    )
    assert found.found == {"data.contrast": ("s/0",), "data.refusals": ("s/2",)}
    assert found.ids == {"s/0", "s/2"}
    warning = found.warning()
    assert warning is not None
    assert warning.startswith("s: 2 of 3 prompts were trained on (1 in data.contrast, 1 in data.refusals)")
    assert found.as_dict()["by_set"] == {"data.contrast": 1, "data.refusals": 1}


def test_a_prompt_in_two_training_sets_counts_once() -> None:
    found = overlap("s", suite_of("a", "b"), {"one": ["a"], "two": ["a"]})
    assert (len(found.ids), found.as_dict()["trained_on"]) == (1, 1)


def test_a_clean_suite_warns_of_nothing() -> None:
    assert overlap("s", suite_of("a"), {"data.contrast": ["b"]}).warning() is None


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published sets are not part of the project and not in {SHARED}")
@pytest.mark.parametrize(
    "spec, counts",
    [
        ("xstest={}/xstest_prompts.csv", {"seemingly_toxic": 250, "toxic": 200}),
        ("or_bench_hard={}/or_bench_dev.jsonl", {"seemingly_toxic": 264}),
        ("or_bench_toxic={}/or_bench_dev.jsonl", {"toxic": 100}),
        ("oktest={}/oktest_dev.jsonl", {"seemingly_toxic": 50}),
        ("coconot={}/coconot_dev.jsonl", {"seemingly_toxic": 927}),
        ("harmbench={}/harmbench_dev.jsonl", {"toxic": 41}),
        ("advbench={}/advbench.jsonl", {"toxic": 520}),
        ("jailbreakbench={}/jailbreakbench.jsonl", {"toxic": 100}),
        ("i_malicious_instructions={}/i_malicious.jsonl", {"toxic": 100}),
        ("{}/or_bench_dev.jsonl", {"seemingly_toxic": 264, "toxic": 100}),
        ("general={}/alpaca_heldout.jsonl", {"general": 500}),
    ],
)
def test_the_development_sets_have_their_counts(spec: str, counts: dict[str, int]) -> None:
    prompts = load_suite(spec.format(SHARED))
    assert Counter(prompt.of_class for prompt in prompts) == counts
    assert len({prompt.id for prompt in prompts}) == len(prompts)
