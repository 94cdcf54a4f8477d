"""The checksum that ranks add up: the same however a tensor is cut, another wherever it has changed."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcr_scale.resume.checksum import _BLOCK, partial_checksum, wrapped

LENGTHS = st.integers(1, 3 * _BLOCK + 5)


def values(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.lists(st.integers(0, 3 * _BLOCK + 5), max_size=4), st.integers(0, 9))
def test_the_parts_of_any_cut_add_up_to_the_whole(count: int, cuts: list[int], seed: int) -> None:
    tensor = values(count, seed)
    edges = sorted({0, count, *(cut % (count + 1) for cut in cuts)})
    parts = [partial_checksum(tensor[start:end], start) for start, end in zip(edges, edges[1:], strict=False)]
    assert wrapped(sum(parts)) == partial_checksum(tensor, 0)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.data())
def test_one_bit_makes_another_sum(count: int, data: st.DataObject) -> None:
    tensor = values(count, 0)
    before = partial_checksum(tensor, 0)
    at, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 31))
    tensor.view(torch.int32)[at] ^= wrapped((1 << bit) << 32) >> 32
    assert partial_checksum(tensor, 0) != before


def test_words_that_change_places_make_another_sum() -> None:
    tensor = values(2 * _BLOCK, 1)
    for one, other in ((0, 1), (5, _BLOCK + 5)):
        moved = tensor.clone()
        moved[[one, other]] = tensor[[other, one]]
        assert partial_checksum(moved, 0) != partial_checksum(tensor, 0)


def test_keys_do_not_change_between_versions() -> None:
    """A checkpoint must be readable by the next version."""
    assert partial_checksum(torch.arange(8, dtype=torch.float32), 3 * _BLOCK + 7) == 1757236670324801536
