"""The contrast set: classes, duplicates, pairs, and a held-out side that shares no family with training."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_tokenizer

from dcr_scale.config import ContrastSource, DataConfig, Label
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import (
    ContrastPrompt,
    ContrastSet,
    EncodedPrompts,
    encode_contrast,
    load_contrast,
    telling,
)
from dcr_scale.data.instructions import load_general
from dcr_scale.data.splitting import normalised, split_by_family
from dcr_scale.errors import UserError


def pairs(families: int, size: int) -> list[dict[str, str]]:
    """``size`` matched pairs in each of so many families."""
    return [
        {
            "prompt": f"{'How is' if label == 'toxic' else 'Why is'} thing {family} {i} done?",
            "label": label,
            "family": f"family {family}",
            "pair": f"{family}-{i}",
        }
        for family in range(families)
        for i in range(size)
        for label in ("seemingly_toxic", "toxic")
    ]


def singles(label: str, count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{label} prompt number {i}", "label": label} for i in range(count)]


def config(tmp_path: Path, *files: Sequence[dict[str, str]], **settings: float) -> DataConfig:
    paths = []
    for i, records in enumerate(files):
        paths.append(tmp_path / f"source{i}.jsonl")
        paths[-1].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DataConfig(contrast=[ContrastSource(path=str(path)) for path in paths], **settings)


def texts(prompts: Sequence[ContrastPrompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def counts(prompts: Sequence[ContrastPrompt]) -> Counter[str]:
    return Counter(prompt.label for prompt in prompts)


def families(prompts: Sequence[ContrastPrompt]) -> set[str]:
    return {prompt.family for prompt in prompts}


def pairs_of(contrast: ContrastSet) -> list[list[str | None]]:
    return [[prompt.pair for prompt in side] for side in (contrast.train, contrast.heldout)]


# --- the split ----------------------------------------------------------------------------------------------


def test_sides_share_no_family_and_keep_each_classs_share(tmp_path: Path) -> None:
    data = config(tmp_path, pairs(40, 4), singles("toxic", 100), heldout=0.2)
    contrast = load_contrast(data, seed=3)
    assert not families(contrast.train) & families(contrast.heldout)
    assert len(contrast.train) + len(contrast.heldout) == 420
    assert counts(contrast.heldout) == {"seemingly_toxic": 32, "toxic": 52}


def test_the_split_depends_on_the_seed_and_not_on_the_rows_order(tmp_path: Path) -> None:
    records = pairs(20, 3)
    shuffled = random.Random(0).sample(records, len(records))
    first = load_contrast(config(tmp_path, records), seed=0)
    again = load_contrast(config(tmp_path, shuffled[:50], shuffled[50:]), seed=0)
    other = load_contrast(config(tmp_path, records), seed=1)
    assert texts(first.train) == texts(again.train) and texts(first.heldout) == texts(again.heldout)
    assert families(first.heldout) != families(other.heldout)


def test_the_sides_of_a_pair_lie_next_to_each_other(tmp_path: Path) -> None:
    for side in pairs_of(load_contrast(config(tmp_path, pairs(10, 3)), seed=0)):
        assert side[0::2] == side[1::2] and len(set(side)) == len(side) // 2


def test_the_heldout_limit_counts_by_class_and_gives_the_rest_to_training(tmp_path: Path) -> None:
    contrast = load_contrast(config(tmp_path, pairs(100, 1), heldout=0.5, heldout_limit=7), seed=0)
    assert counts(contrast.heldout) == {"seemingly_toxic": 7, "toxic": 7}
    assert counts(contrast.train) == {"seemingly_toxic": 93, "toxic": 93}


def test_a_family_larger_than_the_heldout_limit_is_cut_between_pairs(tmp_path: Path) -> None:
    contrast = load_contrast(config(tmp_path, pairs(3, 10), heldout_limit=4), seed=0)
    assert counts(contrast.heldout) == {"seemingly_toxic": 4, "toxic": 4}
    assert len({prompt.pair for prompt in contrast.heldout}) == 4
    assert len(families(contrast.train)) == 2


def test_a_share_too_small_for_any_family_takes_the_smallest(tmp_path: Path) -> None:
    lumps = [
        {"prompt": f"prompt {family} {i}", "label": "toxic", "family": str(family)}
        for family, size in enumerate([30, 3, 31])
        for i in range(size)
    ]
    contrast = load_contrast(config(tmp_path, lumps, singles("safe", 100), heldout=0.01), seed=0)
    assert counts(contrast.heldout) == {"seemingly_toxic": 1, "toxic": 3}


def test_few_large_families_still_hold_one_out(tmp_path: Path) -> None:
    contrast = load_contrast(config(tmp_path, pairs(2, 30), heldout=0.1), seed=0)
    assert len(families(contrast.train)) == len(families(contrast.heldout)) == 1


@given(
    members=st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["a", "b"])), min_size=2, max_size=60),
    share=st.floats(0.01, 0.5),
    limit=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_both_sides_have_every_class_wherever_that_is_possible(
    members: list[tuple[int, str]], share: float, limit: int, seed: int
) -> None:
    items = [
        ContrastPrompt(f"{i}", "toxic" if name == "a" else "seemingly_toxic", str(family), None, "test")
        for i, (family, name) in enumerate(members)
    ]
    train, heldout = split_by_family(
        items,
        of_class=lambda item: item.label,
        unit=lambda item: item.text,
        share=share,
        limit=limit,
        seed=seed,
        purpose="test",
    )
    assert not families(train) & families(heldout)
    assert len({*texts(train), *texts(heldout)}) == len(train) + len(heldout)
    assert all(count <= limit for count in counts(heldout).values())
    of_class = {label: families([i for i in items if i.label == label]) for label in counts(items)}
    if all(len(names) >= 2 for names in of_class.values()):
        assert set(counts(train)) == set(counts(heldout)) == set(of_class)


# --- families, pairs, duplicates, limits --------------------------------------------------------------------


def test_prompts_without_a_family_go_with_their_pair_and_else_alone(tmp_path: Path) -> None:
    records = [{k: v for k, v in record.items() if k != "family"} for record in pairs(6, 1)]
    contrast = load_contrast(config(tmp_path, records, singles("toxic", 4)), seed=0)
    members = Counter(prompt.family for prompt in (*contrast.train, *contrast.heldout))
    assert sorted(members.values()) == [1] * 4 + [2] * 6


def test_duplicates_within_a_class_are_dropped_in_normal_form(tmp_path: Path) -> None:
    repeated = [{"prompt": "TOXIC  prompt, number 0!", "label": "toxic"}]
    data = config(tmp_path, singles("toxic", 5), repeated, singles("seemingly_toxic", 5))
    contrast = load_contrast(data, seed=0)
    assert counts([*contrast.train, *contrast.heldout]) == {"toxic": 5, "seemingly_toxic": 5}
    assert "TOXIC  prompt, number 0!" not in texts([*contrast.train, *contrast.heldout])


def test_a_prompt_in_both_classes_is_an_error_that_lists_it(tmp_path: Path) -> None:
    clash = [{"prompt": "Toxic prompt number 3?", "label": "safe"}]
    with pytest.raises(UserError, match=r"both classes: 'toxic prompt number 3'.*line 4;.*source1.jsonl, line 1"):
        load_contrast(config(tmp_path, singles("toxic", 5), clash), seed=0)


def test_a_limit_draws_whole_pairs_and_grows_with_its_size(tmp_path: Path) -> None:
    def drawn(limit: int) -> set[str]:
        data = config(tmp_path, pairs(30, 2))
        data.contrast[0].limit = limit
        contrast = load_contrast(data, seed=0)
        return set(texts([*contrast.train, *contrast.heldout]))

    small, large = drawn(21), drawn(40)
    assert (len(small), len(large)) == (20, 40) and small < large
    assert len({text.partition("is ")[2] for text in small}) == 10


@pytest.mark.parametrize("missing", ["toxic", "seemingly_toxic"])
def test_a_class_without_prompts_is_named(tmp_path: Path, missing: str) -> None:
    present = "toxic" if missing == "seemingly_toxic" else "seemingly_toxic"
    with pytest.raises(UserError, match=rf"data.contrast has no {missing} prompts \(found 9 {present}\)"):
        load_contrast(config(tmp_path, singles(present, 9)), seed=0)
    with pytest.raises(UserError, match=r"data.contrast has no seemingly_toxic prompts"):
        load_contrast(DataConfig(contrast=[]), seed=0)


def test_a_class_of_one_family_cannot_be_split(tmp_path: Path) -> None:
    lump = [{**record, "family": "one"} for record in singles("toxic", 9)]
    with pytest.raises(UserError, match=r"side has no toxic prompts .*all in one family"):
        load_contrast(config(tmp_path, lump, singles("seemingly_toxic", 9)), seed=0)


def test_pairs_that_are_none_are_refused(tmp_path: Path) -> None:
    extra = {"prompt": "Another one", "label": "toxic", "family": "family 0", "pair": "0-0"}
    with pytest.raises(UserError, match=r"pair '0-0' has two toxic prompts .*line 2;.*line 1\)"):
        load_contrast(config(tmp_path, pairs(4, 2), [extra]), seed=0)
    torn = pairs(4, 2)
    torn[1]["family"] = "family 3"
    with pytest.raises(UserError, match=r"pair '0-0' lies in two families, 'family 0' .* and 'family 3'"):
        load_contrast(config(tmp_path, torn), seed=0)


# --- in token ids -------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_takes_its_partner_along_on_either_side() -> None:
    def prompt(text: str, label: Label, pair: str | None) -> ContrastPrompt:
        return ContrastPrompt(text, label, text, pair, "toy")

    long = "Why? " * 40
    side = (
        prompt("Why?", "seemingly_toxic", "both fit"),
        prompt("What?", "toxic", "both fit"),
        prompt("Who?", "seemingly_toxic", "torn"),
        prompt(long, "toxic", "torn"),
        prompt(long, "toxic", None),
        prompt("How?", "toxic", None),
    )
    encoder = ChatEncoder(toy_tokenizer(), max_prompt_tokens=60, overlong="drop")
    encoded = encode_contrast(ContrastSet(side, side), encoder)
    for kept in (encoded.train, encoded.heldout):
        assert texts(kept.prompts) == ["Why?", "What?", "How?"]
        assert list(kept.ids) == [encoder.encode(text) for text in texts(kept.prompts)]
    alone = ContrastSet(side, side[3:])
    with pytest.raises(UserError, match=r"held-out contrast prompts: no seemingly_toxic prompt is left within data"):
        encode_contrast(alone, encoder)


# --- normal form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Don't  do\tthat!", "don’t do that"),
        ("self-harm", "Self harm"),
        ("ﬁnd it", "FIND IT…"),
        ("Straße", "STRASSE"),
        ("zero\u200bwidth", "zerowidth"),
        ("Ａｂｃ", "abc"),
        ("cafe\u0301", "CAFÉ"),
        ("cafe\u200b\u0301", "café"),
    ],
)
def test_texts_that_count_as_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(("one", "other"), [("kill it", "killit"), ("resume", "résumé"), ("?!", "!!"), ("a b", "b a")])
def test_texts_that_do_not(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@given(st.text())
def test_the_normal_form_is_its_own_normal_form(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


def test_general_instructions_can_be_the_safe_side_and_what_is_held_out_of_them_stays_unseen() -> None:
    data = DataConfig(contrast=[ContrastSource(), ContrastSource(path="general", label="seemingly_toxic", limit=50)])
    found, general = load_contrast(data, seed=0), load_general(data, seed=0)
    taken = [prompt for prompt in (*found.train, *found.heldout) if prompt.source == "general"]
    assert len(taken) == 50 and {prompt.label for prompt in taken} == {"seemingly_toxic"}
    assert {prompt.text for prompt in taken} <= {one.prompt for one in general.train}
    assert not {prompt.text for prompt in taken} & {one.prompt for one in general.heldout}
    encoded = EncodedPrompts(found.heldout, tuple([1] for _ in found.heldout))
    assert "general" not in {prompt.source for prompt, _ in telling(encoded, "seemingly_toxic")}
    alone = EncodedPrompts(tuple(taken), tuple([1] for _ in taken))
    assert len(telling(alone, "seemingly_toxic")) == 50, "where there are no others, they count"


def test_general_instructions_need_a_class() -> None:
    with pytest.raises(UserError, match="give it label: seemingly_toxic"):
        load_contrast(DataConfig(contrast=[ContrastSource(), ContrastSource(path="general")]), seed=0)
