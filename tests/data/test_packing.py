"""Packs: every prompt can be found again with its own past, and the ranks share the work evenly."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr_scale.data.packing import PackLayout, balanced_groups, micro_batches, pack

# Other processes share the cores: time says nothing here.
patient = settings(max_examples=60)


@st.composite
def packs(draw):
    """Sequences with a shared prefix, the prefix's length, and for each the first token of its response."""
    shared = draw(st.lists(st.integers(0, 9), max_size=5))
    own = draw(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=20), min_size=1, max_size=7))
    firsts = [len(shared) + draw(st.integers(1, len(tokens) - 1)) for tokens in own]
    return [shared + tokens for tokens in own], len(shared), firsts


# --- layout ----------------------------------------------------------------------------------------------------


@patient
@given(packs())
def test_every_sequence_is_its_prefix_and_its_own_stretch_of_the_pack(case):
    sequences, prefix, _ = case
    batch = pack(sequences, prefix=prefix)
    layout, tokens = batch.layout, batch.input_ids[0].tolist()
    assert len(tokens) == layout.tokens == prefix + sum(len(sequence) - prefix for sequence in sequences)
    assert layout.longest == max(len(sequence) for sequence in sequences) - prefix
    for i, sequence in enumerate(sequences):
        own = slice(layout.starts[i], layout.starts[i + 1])
        assert tokens[:prefix] + tokens[own] == sequence
        assert batch.position_ids[0, own].tolist() == list(range(prefix, len(sequence)))
        # Pooling sees the pack without its prefix.
        assert layout.cu_seqlens[i : i + 2].tolist() == [own.start - prefix, own.stop - prefix]
    assert batch.position_ids[0, :prefix].tolist() == list(range(prefix))


@patient
@given(packs())
def test_the_key_segments_give_each_query_segment_its_prefix_and_itself(case):
    sequences, prefix, _ = case
    layout = pack(sequences, prefix=prefix).layout
    keys = torch.arange(layout.tokens) if layout.key_index is None else layout.key_index
    queries, bounds = layout.cu_queries.tolist(), layout.cu_keys.tolist()
    assert len(queries) == len(bounds)
    assert (queries[0], queries[-1], bounds[0], bounds[-1]) == (0, layout.tokens, 0, len(keys))
    for at in range(len(queries) - 1):
        own = list(range(queries[at], queries[at + 1]))
        before = [] if own[0] == 0 else list(range(prefix))
        # A causal mask aligned to the last key then shows each query its whole past and nothing else.
        assert keys[bounds[at] : bounds[at + 1]].tolist() == before + own


@patient
@given(packs())
def test_padded_rows_hold_every_token_once_and_little_padding(case):
    sequences, prefix, _ = case
    layout = pack(sequences, prefix=prefix).layout
    values, starts = torch.arange(layout.tokens), torch.tensor(layout.starts)
    seen = []
    for rows in layout.padded_rows:
        assert torch.equal(values[rows.index].flatten()[rows.inside], rows.tokens)
        lengths = Counter((rows.inside // rows.index.shape[1]).tolist())
        assert 2 * min(lengths.values()) >= max(lengths.values()) == rows.index.shape[1]
        # A row is one prompt's tokens in order: a causal mask over columns is one over the prompt.
        for row, length in lengths.items():
            tokens = rows.index[row, :length]
            assert torch.equal(tokens, tokens[0] + torch.arange(length))
            assert len(torch.searchsorted(starts, tokens, right=True).unique()) == 1
        seen += rows.tokens.tolist()
    assert sorted(seen) == list(range(prefix, layout.tokens))


# --- labels ----------------------------------------------------------------------------------------------------


@patient
@given(packs())
def test_labels_are_each_response_token_one_place_early_and_nothing_else(case):
    sequences, prefix, firsts = case
    batch = pack(sequences, prefix=prefix, response_starts=firsts)
    expected = [-100] * prefix
    for sequence, first in zip(sequences, firsts, strict=True):
        following = [*sequence[prefix + 1 :], -100]
        expected += [token if position + 1 >= first else -100 for position, token in enumerate(following, start=prefix)]
    assert batch.labels.tolist() == expected


def test_without_responses_there_are_no_labels():
    assert pack([[1, 2]]).labels is None


# --- errors ----------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="at least one sequence"):
        pack([])
    with pytest.raises(ValueError, match="sequence 1 has 2 tokens, not more than the shared prefix of 2"):
        pack([[1, 2, 3], [1, 2]], prefix=2)
    with pytest.raises(ValueError, match="sequence 1 does not begin with the 2 tokens"):
        pack([[1, 2, 3], [1, 9, 3]], prefix=2)


@pytest.mark.parametrize(("prefix", "first"), [(0, 0), (2, 2), (2, 1)])
def test_a_response_whose_first_token_the_prefix_would_predict_is_refused(prefix, first):
    # The prefix is held once, so its last token can carry one label, not one for each sequence.
    with pytest.raises(ValueError, match=f"starts at token {first} lies in the shared prefix of {prefix}"):
        pack([[1, 2, 3, 4], [1, 2, 5]], prefix=prefix, response_starts=[first, 3])


# --- sharing the work ------------------------------------------------------------------------------------------

costs_lists = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@patient
@given(costs_lists, st.data())
def test_balanced_groups_are_an_even_partition(costs, data):
    groups = data.draw(st.integers(1, len(costs)))
    split = balanced_groups(costs, groups)
    assert len(split) == groups and all(split)
    assert sorted(item for group in split for item in group) == list(range(len(costs)))
    assert all(group == sorted(group) for group in split)
    loads = [sum(costs[i] for i in group) for group in split]
    # Moving the last item put into the heaviest group cannot help: it was the lightest when that item came.
    assert max(loads) - min(loads) <= max(costs)


def test_fewer_items_than_groups_are_refused():
    with pytest.raises(ValueError, match="2 items cannot fill 3 groups"):
        balanced_groups([5, 5], 3)


@patient
@given(costs_lists, st.integers(1, 4), st.integers(1, 200))
def test_every_rank_takes_as_many_micro_steps_and_all_items_are_taken_once(costs, world_size, limit):
    if len(costs) < world_size:
        with pytest.raises(ValueError, match="cannot fill"):
            micro_batches(costs, world_size=world_size, limit=limit)
        return
    plan = micro_batches(costs, world_size=world_size, limit=limit)
    assert len(plan) == world_size and len({len(packs) for packs in plan}) == 1
    assert all(group for packs in plan for group in packs)
    assert sorted(i for packs in plan for group in packs for i in group) == list(range(len(costs)))
    # Every rank computes the plan for itself.
    assert plan == micro_batches(list(costs), world_size=world_size, limit=limit)


@patient
@given(costs_lists, st.integers(1, 4), st.integers(1, 200))
def test_packs_stay_within_the_limit_in_as_few_micro_steps_as_that_takes(costs, world_size, limit):
    if len(costs) < world_size:
        return
    reachable = max(limit, max(costs))

    def heaviest(steps: int) -> int:
        return max(sum(costs[i] for i in group) for group in balanced_groups(costs, world_size * steps))

    steps = len(micro_batches(costs, world_size=world_size, limit=limit)[0])
    another_step_would_starve_a_rank = world_size * (steps + 1) > len(costs)
    assert heaviest(steps) <= reachable or another_step_would_starve_a_rank
    assert all(heaviest(fewer) > reachable for fewer in range(1, steps))


@patient
@given(costs_lists, st.integers(1, 4), st.integers(1, 200), st.integers(1, 150))
def test_first_packs_leave_room_for_what_they_carry_besides(costs, world_size, limit, beside):
    if len(costs) < world_size:
        return
    plan = micro_batches(costs, world_size=world_size, limit=limit, beside=beside)
    assert sorted(i for packs in plan for group in packs for i in group) == list(range(len(costs)))
    loads = [
        sum(costs[i] for i in group) + (beside if number == 0 else 0)
        for packs in plan
        for number, group in enumerate(packs)
    ]
    reachable = max(limit, *costs, beside + min(costs))
    assert max(loads) <= reachable or world_size * (len(plan[0]) + 1) > len(costs)
    assert all(group for packs in plan for group in packs)


def test_what_stands_beside_items_costs_no_micro_step_that_other_packs_have_room_for():
    assert len(micro_batches([50] * 8, world_size=1, limit=200)[0]) == 2
    assert len(micro_batches([50] * 6, world_size=1, limit=200, beside=100)[0]) == 2


def test_one_overlong_item_does_not_scatter_the_others():
    plan = micro_batches([100, 10, 10, 10, 10, 10], world_size=1, limit=50)
    assert plan == [[[0], [1, 2, 3, 4, 5]]]


def test_the_layout_lies_where_the_tokens_lie():
    layout = PackLayout(1, (2, 3), torch.device("meta"))
    for tensor in (layout.cu_seqlens, layout.cu_queries, layout.cu_keys, layout.key_index, layout.positions):
        assert tensor.device.type == "meta"
