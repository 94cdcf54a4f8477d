"""Ranks that refuse together: a failure on one of them is raised on all, and none waits for one that has gone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from dcr_scale.errors import UserError
from dcr_scale.probe.reduction import world_size


def agree(failure: str | None) -> None:
    """Raise the first rank's failure as a ValueError on every rank. All ranks must call it."""
    first = first_of(failure)
    if first is not None:
        raise ValueError(first)


def first_of(finding: str | None) -> str | None:
    """The first rank's finding, the same on every rank; None where none has one. All ranks must call it."""
    findings = [finding]
    if world_size() > 1:
        findings = [None] * world_size()
        dist.all_gather_object(findings, finding)
    return next((text for text in findings if text is not None), None)


def check_same(what: str, value: object) -> None:
    """Raise ValueError on every rank where ``value``, which has a telling repr, is not the same on all of them."""
    if world_size() == 1:
        return
    digests: list[Any] = [None] * world_size()
    dist.all_gather_object(digests, hashlib.sha256(repr(value).encode()).digest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise ValueError(f"rank {other} was given other {what} than rank 0; every rank takes all of them alike")


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block of checks, which must hold no collective; what one rank refuses is a ValueError on every rank.

    A chat template is a program and raises what it likes: as a UserError, which is no ValueError.
    """
    failure: str | None = None
    try:
        yield
    except (ValueError, UserError) as error:
        failure = str(error)
    agree(failure)
