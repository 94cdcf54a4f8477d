"""The counter-based generator: the published one, and the same numbers however they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dcr_scale.probe.philox import _signs_by_torch, derive_key, normals, philox, signs

# From the generator's authors: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected, kind):
    words = philox([kind([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("rows", [1, 16, 100, 129, 300])
def test_devices_draw_what_the_cpu_draws(rows):
    keys, columns = [derive_key(part) for part in "abc"], torch.tensor([5, 0, 2**33 + 7, 130, 2**61])
    expected = _signs_by_torch(keys, columns, rows)
    assert expected.dtype == torch.int8 and set(expected.unique().tolist()) == {-1, 1}
    assert torch.equal(signs(keys, columns, rows), expected)
    assert signs(keys, columns[:0], rows).shape == _signs_by_torch(keys, columns[:0], rows).shape == (0, 3, rows)


def test_rows_and_columns_do_not_depend_on_what_else_is_asked_for():
    key = derive_key(0, "layer", "in", 1)
    columns = torch.tensor([5, 0, 2**33 + 7, 130])
    many = signs([derive_key("other"), key], columns, 300)
    assert many.shape == (4, 2, 300)
    assert not torch.equal(many[:, 0], many[:, 1])
    for rows in (1, 16, 128, 129):
        assert torch.equal(signs([key], columns, rows)[:, 0], many[:, 1, :rows])
    assert torch.equal(signs([key], columns[2:3], 300)[:, 0], many[2:3, 1])
    assert torch.equal(normals(key, 1000)[:37], normals(key, 37))


def test_keys_differ_in_every_part():
    keys = {derive_key(seed, name, role) for seed in (0, 1) for name in ("a", "b") for role in ("in", "out")}
    assert len(keys) == 8
    assert derive_key("a", "bc") != derive_key("ab", "c")


def test_signs_are_balanced_and_uncorrelated():
    drawn = signs([derive_key("balance")], torch.arange(20_000), 8)[:, 0].double()
    moments = drawn.T @ drawn / len(drawn)
    # Five standard errors of a mean of 20,000 signs.
    assert drawn.mean(dim=0).abs().max() < 5 / len(drawn) ** 0.5
    assert (moments - torch.eye(8)).abs().max() < 5 / len(drawn) ** 0.5


def test_normals_have_the_moments_of_a_gaussian():
    drawn = normals(derive_key("gauss"), 200_000)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - moment) < 5 * (variance / len(drawn)) ** 0.5
