"""The audit finds the shortcuts that are there, and none where there are none."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dcr_scale.data.contrast import ContrastPrompt
from dcr_scale.evaluation import audit as audits
from dcr_scale.evaluation.audit import Audit, audit, mood
from dcr_scale.evaluation.intervals import Interval

THINGS = ("wall", "lamp", "shed", "roof", "boat", "desk", "gate", "pipe")
DEEDS = ("mend", "paint", "lift", "sell", "weigh", "move")


def prompt(text: str, label: str, family: str, source: str = "one", pair: str | None = None) -> ContrastPrompt:
    return ContrastPrompt(text, label, family, pair, source)  # type: ignore[arg-type]


def topics() -> list[tuple[str, str]]:
    return [(deed, thing) for deed in DEEDS for thing in THINGS]


def by_mood(source: str = "one", flipped: bool = False) -> list[ContrastPrompt]:
    """Toxic prompts are imperatives, the others questions, on the same topics; or the other way round."""
    return [
        prompt(text, label, f"{source} {deed} {thing}", source)
        for deed, thing in topics()
        for text, label in (
            (f"How do I {deed} the {thing}?", "toxic" if flipped else "seemingly_toxic"),
            (f"{deed.title()} the {thing}.", "seemingly_toxic" if flipped else "toxic"),
        )
    ]


def at_random(source: str = "one") -> list[ContrastPrompt]:
    generator = random.Random(0)
    return [
        prompt(
            f"How do I {deed} the {thing}?", generator.choice(["toxic", "seemingly_toxic"]), f"{deed} {thing}", source
        )
        for deed, thing in topics()
    ]


def test_a_shortcut_by_mood_is_found_and_named() -> None:
    found = audit(by_mood())
    assert found.within["mood"].low > 0.99
    assert found.within["words"].low > 0.9  # "how", "do" and "I" are words
    warnings = "\n".join(found.warnings())
    assert "mood alone tells the sides apart (AUC 1.000" in warnings
    assert "punctuation alone tells" in warnings
    assert found.verdict().startswith("shortcut audit: WARNING: punctuation alone tells")
    assert found.verdict().endswith("(and 2 more)")
    assert "end in a question mark: 100% of seemingly_toxic, 0% of toxic" in found.table()


def test_labels_at_random_give_chance_and_no_warning() -> None:
    found = audit(at_random())
    for area in found.within.values():
        assert area.low <= 0.5 <= area.high
    assert found.warnings() == []
    assert found.verdict().startswith("shortcut audit: surface features hardly tell the sides apart (AUC 0.")


@pytest.mark.parametrize(("length", "alone"), [(0.55, "hardly"), (0.7, "in part")])
def test_the_verdict_on_telling_words_says_what_style_alone_does(length: float, alone: str) -> None:
    def area(low: float) -> Interval:
        return Interval(low + 0.05, low, low + 0.1)

    within = {"words": area(0.8), "punctuation": area(0.5), "length": area(length), "mood": area(0.5), "all": area(0.8)}
    verdict = Audit({}, within, {}, {}, None, False, ()).verdict()
    assert "surface features tell the sides apart" in verdict
    assert verdict.endswith(f", punctuation, length or mood alone {alone}")


def test_words_that_recur_in_a_family_alone_tell_nothing() -> None:
    """Each family has its own word for toxic: known inside the family, of no use on another."""
    prompts = [
        prompt(f"How do I {word}{number} it?", label, str(number))
        for number in range(40)
        for word, label in (("good", "seemingly_toxic"), ("bad", "toxic"))
        for _ in range(3)
    ]
    assert audit(prompts).within["words"].estimate == pytest.approx(0.5, abs=0.05)


def test_what_holds_in_one_collection_and_not_in_another_is_said_to_be_the_collection() -> None:
    found = audit(by_mood("here"), elsewhere=by_mood("there", flipped=True))
    assert found.across["there"].high < 0.01
    assert any("is near chance on there (AUC 0.000" in line for line in found.warnings())


def test_sources_with_both_classes_are_judged_within_and_across() -> None:
    found = audit([*by_mood("a"), *by_mood("b")])
    assert found.by_source.keys() == found.across.keys() == {"a", "b"}
    assert found.across["a"].low > 0.99
    assert not found.sources_of_one_class


def test_a_source_a_class_is_warned_of_even_where_no_feature_tells() -> None:
    prompts = [p if p.label == "toxic" else ContrastPrompt(p.text, p.label, p.family, None, "two") for p in at_random()]
    found = audit(prompts)
    assert found.sources_of_one_class
    assert found.verdict().startswith("shortcut audit: WARNING: no source has prompts of both classes")


def test_matched_pairs_are_counted_by_which_side_scores_higher() -> None:
    """A telling last word makes every pair fall on the right side; pairs without a partner count nothing."""
    paired = [
        prompt(f"How do I {deed} the {thing} {end}?", label, f"{deed} {thing}", pair=f"{deed} {thing}")
        for deed, thing in topics()
        for end, label in (("kindly", "seemingly_toxic"), ("cruelly", "toxic"))
    ]
    lonely = prompt("How do I mend it cruelly?", "toxic", "lonely", pair="lonely")
    found = audit([*paired, lonely])
    assert found.pairs is not None
    assert (found.pairs.estimate, found.pairs.high) == (1, 1)
    assert found.pairs.low == pytest.approx(0.926, abs=0.001)  # Wilson of 48 in 48


def test_one_class_alone_cannot_be_audited() -> None:
    with pytest.raises(ValueError, match="all 48 prompts are toxic"):
        audit([p for p in by_mood() if p.label == "toxic"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("How do I mend it?", "question"),
        ("what's the best way to mend it", "question"),
        ("Mend it.", "imperative"),
        ("Mend it, will you?", "question"),
        ("I would like to mend it.", "statement"),
        ("", "imperative"),
    ],
)
def test_moods(text: str, expected: str) -> None:
    assert mood(text) == expected


def write(path: Path, prompts: list[ContrastPrompt]) -> str:
    rows = [{"prompt": p.text, "label": p.label, "family": p.family} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def elsewhere() -> list[ContrastPrompt]:
    """As :func:`by_mood` has them the other way round, on other things."""
    return [replace(p, text=p.text.replace("the", "that")) for p in by_mood(flipped=True)]


def test_the_command_reads_files_and_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write(tmp_path / "here.jsonl", by_mood())
    there = write(tmp_path / "there.jsonl", elsewhere())
    assert audits.main([here, "--elsewhere", there]) == 0
    from_file = capsys.readouterr().out
    assert "48 seemingly_toxic, 48 toxic;" in from_file
    assert from_file.splitlines()[-1].startswith("shortcut audit: WARNING: ")
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{contrast: [{{path: {here}}}], heldout_limit: 1}}\n", encoding="utf-8")
    assert audits.main([str(config), "--elsewhere", there]) == 0
    assert capsys.readouterr().out == from_file


def test_what_the_set_has_itself_is_not_judged_as_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write(tmp_path / "here.jsonl", by_mood())
    others = elsewhere()
    there = write(tmp_path / "there.jsonl", [*others, *by_mood()[:10]])
    assert audits.main([here, "--elsewhere", there]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n\n")
    assert first == "10 of 106 prompts of --elsewhere are in the set itself: left out"
    assert audits.main([here, "--elsewhere", write(tmp_path / "there.jsonl", others)]) == 0
    assert capsys.readouterr().out == rest
    assert audits.main([here, "--elsewhere", here]) == 2
    assert "of 96 prompts, 0 are not in the set itself" in capsys.readouterr().err


def test_the_command_names_the_file_and_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = write(tmp_path / "here.jsonl", by_mood())
    toxic = write(tmp_path / "toxic.jsonl", [p for p in by_mood() if p.label == "toxic"])
    assert audits.main([toxic]) == 2
    assert capsys.readouterr().err.startswith(f"error: {toxic}: data.contrast has no seemingly_toxic prompts")
    assert audits.main([here, "--elsewhere", toxic]) == 2
    assert capsys.readouterr().err.startswith(f"error: --elsewhere: {toxic}: data.contrast has no seemingly_toxic")


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audits.main([str(tmp_path / "none.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file")


def test_the_built_in_pairs_offer_no_shortcut() -> None:
    found = audit(audits.read_prompts(["builtin"]))
    assert found.warnings() == []
    assert found.within["all"].high < 0.65
