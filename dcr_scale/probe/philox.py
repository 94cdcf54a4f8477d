"""Random numbers by counter: Philox4x32-10, as integer arithmetic on tensors or arrays.

An entry of a projection is a function of (key, row, column) alone. It is the same on every device and world size, need
not be stored, and does not change when more of them are drawn: the first rows of a larger matrix are the smaller one.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Raised whenever a key would give other numbers than before.
VERSION = 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_ROWS_A_CALL = 128


def derive_key(*parts: object) -> tuple[int, int]:
    """Two 32-bit words that stand for ``parts`` (seed, module, role, …) and :data:`VERSION`."""
    text = "\x1f".join(str(part) for part in (VERSION, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    """Four 32-bit words for every counter.

    ``counter``: four int64 tensors or numpy arrays of values below 2³² that broadcast together, and with the two words
    of the key where those are tensors or arrays too. Returns four of their kind, int64 of values below 2³².
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # Every word comes to depend on all others, so that shapes end as they broadcast.
    for _ in range(_ROUNDS):
        # The product wraps to the signed 64 bits; shifted and masked, both halves are those of the unsigned one.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def signs(keys: Sequence[tuple[int, int]], columns: Tensor, rows: int) -> Tensor:
    """Rademacher ±1: int8 [len(columns), len(keys), rows].

    Entry (j, k, i) belongs to key k, column ``columns[j]`` (int64, below 2⁶²) and row i, whatever is drawn beside it.
    """
    if columns.device.type == "cpu":
        return torch.from_numpy(_signs_by_numpy(keys, columns.numpy(), rows))
    return _signs_by_torch(keys, columns, rows)


def _signs_by_torch(keys: Sequence[tuple[int, int]], columns: Tensor, rows: int) -> Tensor:
    zero = columns.new_zeros(())
    low, high = (columns & _MASK)[:, None, None], (columns >> 32)[:, None, None]
    call = torch.arange(math.ceil(rows / _ROWS_A_CALL), device=columns.device)
    key_K2 = torch.tensor(keys, device=columns.device)
    words_JKCW = torch.stack(philox((low, high, call, zero), (key_K2[:, :1], key_K2[:, 1:])), dim=-1)
    needed = words_JKCW.flatten(2)[..., : math.ceil(rows / 32)]
    bits = (needed[..., None] >> torch.arange(32, device=columns.device)) & 1
    return (2 * bits.flatten(2)[..., :rows] - 1).to(torch.int8)


def _signs_by_numpy(keys: Sequence[tuple[int, int]], columns: np.ndarray, rows: int) -> np.ndarray:
    """The same on the CPU, where draws are many and small, and numpy's operators start sooner."""
    low, high = (columns & _MASK)[:, None, None], (columns >> 32)[:, None, None]
    call, key_K2 = np.arange(math.ceil(rows / _ROWS_A_CALL)), np.array(keys)
    words = philox((low, high, call, np.zeros_like(call)), (key_K2[:, :1], key_K2[:, 1:]))
    words_JKW = np.stack(words, axis=-1).astype("<u4").reshape(len(columns), len(keys), 4 * len(call))
    bytes_JKB = words_JKW.view(np.uint8)
    return 2 * np.unpackbits(bytes_JKB, axis=-1, count=rows, bitorder="little").view(np.int8) - 1


def normals(key: tuple[int, int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, float64 [count], by Box and Muller's transform."""
    index = torch.arange(math.ceil(count / 4), device=device)
    zero = index.new_zeros(())
    words = [(word.double() + 0.5) / 2**32 for word in philox((index & _MASK, index >> 32, zero, zero), key)]
    pairs = []
    for uniform, turn in (words[:2], words[2:]):
        radius, angle = (-2 * uniform.log()).sqrt(), 2 * math.pi * turn
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=1).flatten()[:count]
