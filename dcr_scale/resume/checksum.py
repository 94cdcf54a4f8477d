"""A checksum of a tensor that ranks compute together, whichever elements each of them holds.

The multilinear hash Σ_i key_i · word_i mod 2^64 (Carter and Wegman, Universal classes of hash functions, 1979) over a
tensor's 32-bit words. A sum has no order, so each rank adds up what it holds, at any world size, while it writes or
reads: nothing is read twice. Odd keys find every change of one word for certain, others but for one in about 2^32.
It guards against disks and networks, not against people.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Keys repeat after so many words, multiplied by another odd number each time.
_BLOCK = 2**16
# Where the keys are taken from what _odd gives: beyond any number of blocks.
_KEYS = 2**48


@cache
def _keys(device: torch.device) -> Tensor:
    """int64 [block]: odd numbers, by arithmetic alone, so that no version of torch draws others."""
    return torch.tensor([wrapped(_odd(_KEYS + i)) for i in range(_BLOCK)], device=device)


def partial_checksum(values: Tensor, start: int) -> int:
    """What elements [start, start + n) of a flattened float32 tensor add to its checksum; ``values``: contiguous [n].

    The sum of the parts, modulo 2^64 as a signed number (:func:`wrapped`), is the tensor's. int64 products and sums
    wrap around by themselves. The work space is 16 bytes an element.
    """
    words = values.view(torch.int32)
    head = min(-start % _BLOCK, words.numel())
    whole = (words.numel() - head) // _BLOCK * _BLOCK
    total = _block_sums(words[:head], start)
    total += _block_sums(words[head : head + whole], start + head)
    total += _block_sums(words[head + whole :], start + head + whole)
    return wrapped(total)


def _block_sums(words: Tensor, start: int) -> int:
    """Of words that lie in one block, or fill blocks."""
    if not words.numel():
        return 0
    block, offset = divmod(start, _BLOCK)
    rows = words.view(-1, min(words.numel(), _BLOCK)).long()
    sums = (rows * _keys(words.device)[offset : offset + rows.shape[1]]).sum(1)
    factors = torch.tensor([wrapped(_odd(block + i)) for i in range(len(rows))], device=words.device)
    return int((sums * factors).sum())


def wrapped(value: int) -> int:
    """A whole number modulo 2^64, in [-2^63, 2^63)."""
    return (value + 2**63) % 2**64 - 2**63


def _odd(number: int) -> int:
    """An odd number for each whole one: splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    z = (number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31) | 1
