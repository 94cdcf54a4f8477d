"""Which model a folder of completions belongs to."""

from __future__ import annotations

import hashlib

import torch

from dcr_scale.models.checkpoint import Checkpoint

_SAMPLED = 32


def weights_digest(checkpoint: Checkpoint) -> str:
    """Hexadecimal digest of every tensor's name, dtype, shape, and the numbers in its middle.

    Training leaves no trained tensor's middle as it was, so that a model which was trained further in the same folder
    is told apart without reading it all.
    """
    found = hashlib.sha256()
    for name, info in sorted(checkpoint.tensors.items()):
        count = min(_SAMPLED, info.numel)
        middle = checkpoint.read(name, (info.numel - count) // 2, count)
        found.update(f"{name} {info.dtype} {info.shape}".encode())
        found.update(middle.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def digest(data: bytes) -> str:
    """Hexadecimal digest of some bytes."""
    return hashlib.sha256(data).hexdigest()[:32]
