"""Stage 2's sets and mixture: exact share, no prompt on two sides, no toxic prompt in both stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcr_scale.config import DataConfig, Source, load_config
from dcr_scale.data.contrast import ContrastPrompt, ContrastSet
from dcr_scale.data.instructions import (
    Instruction,
    InstructionSet,
    MixturePools,
    build_mixture,
    load_answered,
    load_general,
    load_refusals,
)
from dcr_scale.data.leakage import check_leakage
from dcr_scale.errors import UserError


def source(tmp_path: Path, records: list[dict[str, str]], name: str = "rows.jsonl") -> Source:
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return Source(path=str(path))


def answers(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Count to {i}.", "response": f"Up to {i}."} for i in range(count)]


def instructions(count: int, *, refusal: bool) -> list[Instruction]:
    kind = "Harm" if refusal else "Help"
    return [Instruction(f"{kind} {i}", f"Answer {i}", refusal, f"{kind} {i}", "test") for i in range(count)]


# --- the sets -----------------------------------------------------------------------------------------------


def test_general_and_refusals_are_told_apart_and_split(tmp_path: Path) -> None:
    rows = [source(tmp_path, answers(50))]
    for load, refusal in ((load_general, False), (load_refusals, True)):
        loaded = load(DataConfig(general=rows, refusals=rows, heldout=0.2), seed=0)
        assert (len(loaded.train), len(loaded.heldout)) == (40, 10)
        assert {i.refusal for i in (*loaded.train, *loaded.heldout)} == {refusal}
        assert not {i.family for i in loaded.train} & {i.family for i in loaded.heldout}


def test_answered_prompts_all_train_and_none_by_default(tmp_path: Path) -> None:
    loaded = load_answered(DataConfig(answered=[source(tmp_path, answers(12))]), seed=0)
    assert len(loaded) == 12 and not any(instruction.refusal for instruction in loaded)
    assert load_answered(DataConfig(), seed=0) == ()


def test_only_the_same_answer_to_the_same_prompt_is_a_duplicate(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is 2 + 3?", "response": "5"},
        {"prompt": "What is 2 - 3?", "response": "-1"},
        {"prompt": "what is 2 + 3", "response": "5"},
        {"prompt": "Say hello.", "response": "Hello."},
        {"prompt": "Say hello.", "response": "Good day."},
    ]
    loaded = load_general(DataConfig(general=[source(tmp_path, rows)]), seed=0)
    assert len(loaded.train) + len(loaded.heldout) == 4


def test_paraphrases_of_punctuation_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"Rhyme {i}{mark}", "response": f"r{mark}"} for i in range(20) for mark in ("", "!", "?")]
    for seed in range(5):
        loaded = load_general(DataConfig(general=[source(tmp_path, rows)], heldout=0.5), seed=seed)
        train, heldout = ({i.prompt.rstrip("!?") for i in side} for side in (loaded.train, loaded.heldout))
        assert heldout and not train & heldout


def test_limit_and_heldout_limit(tmp_path: Path) -> None:
    rows = source(tmp_path, answers(100))
    rows.limit = 40
    loaded = load_general(DataConfig(general=[rows], heldout=0.5, heldout_limit=5), seed=0)
    assert (len(loaded.train), len(loaded.heldout)) == (35, 5)


def test_one_prompt_in_two_families_cannot_hide_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": "The same prompt", "response": f"No, {i}.", "family": f"family {i}"} for i in range(10)]
    with pytest.raises(UserError, match=r"data.refusals: prompts in families on both sides.*'The same prompt'"):
        load_refusals(DataConfig(refusals=[source(tmp_path, rows)]), seed=0)


@pytest.mark.parametrize("count", [1, 5])
def test_a_set_of_one_family_cannot_be_split(tmp_path: Path, count: int) -> None:
    rows = [{**answer, "family": "one"} for answer in answers(count)]
    with pytest.raises(UserError, match=rf"data.general: found {count} examples, all of one family"):
        load_general(DataConfig(general=[source(tmp_path, rows)]), seed=0)


# --- leakage ------------------------------------------------------------------------------------------------


def contrast_set(train: str, heldout: str) -> ContrastSet:
    def side(name: str, toxic: str) -> tuple[ContrastPrompt, ...]:
        return (
            ContrastPrompt(f"Why is the {name} sky blue?", "seemingly_toxic", f"{name} s", None, "test"),
            ContrastPrompt(toxic, "toxic", f"{name} t", None, "test", "stage1.jsonl, line 7"),
        )

    return ContrastSet(side("train", train), side("heldout", heldout))


def refusal_set(train: str, heldout: str) -> InstructionSet:
    def side(prompt: str) -> tuple[Instruction, ...]:
        return (Instruction(prompt, "I won't.", True, prompt, "test", "stage2.jsonl, line 9"),)

    return InstructionSet(side(train), side(heldout))


def test_stages_that_share_nothing_pass() -> None:
    check_leakage(contrast_set("Rob a bank", "Rob a shop"), refusal_set("Rob a house", "Rob a train"))


@pytest.mark.parametrize("stage_1", ["train", "heldout"])
@pytest.mark.parametrize("stage_2", ["train", "heldout"])
def test_a_toxic_prompt_in_both_stages_is_listed_from_any_side(stage_1: str, stage_2: str) -> None:
    first = {"train": "Rob a bank", "heldout": "Rob a shop", stage_1: "How do I rob a museum?"}
    second = {"train": "Rob a house", "heldout": "Rob a train", stage_2: "how do I ROB a museum"}
    with pytest.raises(UserError, match=r"'how do I ROB a museum' \(stage1.jsonl, line 7; stage2.jsonl, line 9\)"):
        check_leakage(contrast_set(**first), refusal_set(**second))


def test_a_seemingly_toxic_prompt_must_not_be_refused() -> None:
    with pytest.raises(UserError, match="stage 1's seemingly_toxic prompts are refused in stage 2"):
        check_leakage(contrast_set("Rob a", "Rob b"), refusal_set("Why is the heldout sky blue", "Rob c"))


def test_a_long_list_is_cut_and_counted() -> None:
    prompts = [f"Rob bank {i}" for i in range(20)]
    contrast = ContrastSet(tuple(ContrastPrompt(p, "toxic", p, None, "test") for p in prompts), ())
    refusals = InstructionSet(tuple(Instruction(p, "No.", True, p, "test") for p in prompts), ())
    with pytest.raises(UserError, match="20 in all") as caught:
        check_leakage(contrast, refusals)
    assert str(caught.value).count("Rob bank") == 3


def test_what_is_answered_must_be_no_toxic_held_out_or_refused_prompt() -> None:
    contrast, refusals = contrast_set("Rob a bank", "Rob a shop"), refusal_set("Rob a house", "Rob a train")

    def answered(prompt: str) -> list[Instruction]:
        return [Instruction(prompt, "Like this.", False, prompt, "test", "answers.jsonl, line 3")]

    check_leakage(contrast, refusals, answered("Why is the train sky blue"))
    for prompt in ("rob a bank", "Rob a shop", "Why is the heldout sky blue", "Rob a house", "Rob a train"):
        with pytest.raises(UserError, match=r"data\.answered: .*answers\.jsonl, line 3"):
            check_leakage(contrast, refusals, answered(prompt))


# --- the mixture --------------------------------------------------------------------------------------------


@given(
    general=st.integers(0, 60),
    refusals=st.integers(0, 60),
    share=st.floats(0, 1),
    examples=st.one_of(st.none(), st.integers(1, 80)),
    seed=st.integers(0, 3),
)
def test_the_share_is_exact_or_an_error_says_why(
    general: int, refusals: int, share: float, examples: int | None, seed: int
) -> None:
    pools = instructions(general, refusal=False), instructions(refusals, refusal=True)

    def build(size: int | None) -> list[Instruction]:
        return build_mixture(MixturePools(*pools, refusal_share=share), examples=size, seed=seed)

    def possible(size: int) -> bool:
        wanted = int(size * share + 0.5)
        return wanted <= refusals and size - wanted <= general

    largest = max(size for size in range(general + refusals + 1) if possible(size))
    if (examples is None and largest == 0) or (examples is not None and not possible(examples)):
        with pytest.raises(UserError, match="needs"):
            build(examples)
        return
    mixture = build(examples)
    assert len(mixture) == (largest if examples is None else examples)
    assert sum(example.refusal for example in mixture) == int(len(mixture) * share + 0.5)
    assert len(set(mixture)) == len(mixture)
    assert mixture == build(examples)


def test_the_mixture_is_shuffled_and_smaller_ones_lie_within_larger() -> None:
    pools = MixturePools(instructions(500, refusal=False), instructions(100, refusal=True), refusal_share=0.1)
    small, large = (build_mixture(pools, examples=size, seed=0) for size in (200, 400))
    other = build_mixture(pools, examples=200, seed=1)
    assert set(small) < set(large) and set(small) != set(other)
    assert 2 <= sum(example.refusal for example in small[:100]) <= 18


def test_too_few_refusals_say_what_would_work() -> None:
    pools = MixturePools(instructions(1000, refusal=False), instructions(20, refusal=True), refusal_share=0.05)
    with pytest.raises(UserError) as caught:
        build_mixture(pools, examples=1000, seed=0)
    message = str(caught.value)
    assert "needs 950 general instructions and 50 refusals; found 1000" in message and "20 refusals" in message
    assert "set align.examples to 409, or" in message
    assert len(build_mixture(pools, examples=409, seed=0)) == 409


@given(
    pools=st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda shares: sum(shares) <= 1),
    examples=st.one_of(st.none(), st.integers(1, 60)),
)
def test_answered_prompts_have_their_share_too(
    pools: tuple[int, int, int], shares: tuple[float, float], examples: int | None
) -> None:
    """Every size is within one example of each share; a size that is advised works, and is the largest that does."""
    general, refusals = instructions(pools[0], refusal=False), instructions(pools[1], refusal=True)
    answered = [Instruction(f"Kill {i}", "Like this.", False, f"Kill {i}", "answered") for i in range(pools[2])]
    drawn = MixturePools(general, refusals, answered, refusal_share=shares[0], answered_share=shares[1])

    def build(size: int | None) -> list[Instruction]:
        return build_mixture(drawn, examples=size, seed=0)

    largest = max((size for size in range(1, sum(pools) + 1) if drawn.fit(size)), default=0)
    try:
        mixture = build(examples)
    except UserError as error:
        advised = f"set align.examples to {largest}, or " in str(error)
        assert advised if largest else "set align.examples" not in str(error)
        return
    assert len(mixture) == (largest if examples is None else examples)
    assert len(set(mixture)) == len(mixture)
    counts = (sum(one.refusal for one in mixture), sum(one.source == "answered" for one in mixture))
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - share * len(mixture)) <= 1


def test_too_few_answered_prompts_say_what_would_work() -> None:
    drawn = instructions(1000, refusal=False), instructions(100, refusal=True), instructions(5, refusal=False)
    pools = MixturePools(*drawn, refusal_share=0.05, answered_share=0.1)
    with pytest.raises(UserError) as caught:
        build_mixture(pools, examples=400, seed=0)
    message = str(caught.value)
    assert "needs 340 general instructions, 20 refusals and 40 answered seemingly toxic prompts; found" in message
    assert "align.refusal_share=0.05 and align.answered_share=0.1" in message
    assert "set align.examples to 5" in message


@pytest.mark.parametrize(
    ("pools", "scarce"),
    [
        ((80, 100, 100), "80 general instructions"),
        ((1000, 5, 100), "5 refusals"),
        ((1000, 100, 12), "12 answered seemingly toxic prompts"),
        ((80, 10, 10), "80 general instructions"),
    ],
)
def test_what_a_mixture_has_no_more_of_is_told(pools: tuple[int, int, int], scarce: str) -> None:
    drawn = [instructions(size, refusal=at == 1) for at, size in enumerate(pools)]
    assert MixturePools(*drawn, refusal_share=0.1, answered_share=0.1).scarce() == scarce


def test_a_share_without_answers_or_the_reverse_is_a_mistake() -> None:
    source = "data.answered=[{path: answers.jsonl}]"
    assert load_config(None, [source, "align.answered_share=0.1"]).data.answered[0].path == "answers.jsonl"
    for overrides in ([source], ["align.answered_share=0.1"]):
        with pytest.raises(UserError, match="give both or neither"):
            load_config(None, overrides)
    with pytest.raises(UserError, match="more than the whole mixture"):
        load_config(None, [source, "align.answered_share=0.6", "align.refusal_share=0.5"])
