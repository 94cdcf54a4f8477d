"""What may share a side: prompts compared in normal form, and splits by family that depend on the seed alone.

Rows are ordered by a hash of the seed and their own text, never by their place in a file: the same rows in
another order, or read by another rank, split alike, and a prefix of any split is a random sample of it.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from dcr_scale.data.sources import quoted

Item = TypeVar("Item")


class InFamily(Protocol):
    """What :func:`split_by_family` divides."""

    @property
    def family(self) -> str: ...


Member = TypeVar("Member", bound=InFamily)


def normalised(text: str) -> str:
    """The form in which two prompts count as the same: NFKC, case folded, no punctuation, single spaces.

    Apostrophes and invisible characters vanish, other punctuation separates words; a text of nothing but
    punctuation keeps it.
    """
    folded = _nfkc(_nfkc(text).casefold())
    # again, for letters and accents between which something invisible has gone
    words = _nfkc(folded.translate(_SEPARATORS))
    return " ".join(words.split()) or " ".join(folded.split())


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


class _Separators(dict[int, str]):
    """``str.translate``'s table, filled with the characters that turn up."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if category == "Cf" or character in "'’‘ʼ":
            self[code] = ""
        else:
            self[code] = " " if category.startswith("P") else character
        return self[code]


_SEPARATORS = _Separators()


def seeded_order(items: Iterable[Item], key: Callable[[Item], str], *, seed: int, purpose: str) -> list[Item]:
    """The items in a random order given by seed, purpose and each item's key; equal keys stay together."""

    def rank(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}\x1f{purpose}\x1f{key(item)}".encode()).digest()

    return sorted(items, key=rank)


def draw(
    items: Sequence[Item], limit: int | None, unit: Callable[[Item], str], *, seed: int, purpose: str
) -> list[Item]:
    """At most ``limit`` of the items, drawn by the seed; items of one unit come together or not at all."""
    if limit is None or len(items) <= limit:
        return list(items)
    sizes = Counter(map(unit, items))
    drawn = []
    room = limit
    taken: set[str] = set()
    for item in seeded_order(items, unit, seed=seed, purpose=purpose):
        name = unit(item)
        if name not in taken and sizes[name] <= room:
            taken.add(name)
            room -= sizes[name]
        if name in taken:
            drawn.append(item)
    return drawn


def split_by_family(
    items: Sequence[Member],
    *,
    of_class: Callable[[Member], str],
    unit: Callable[[Member], str],
    share: float,
    limit: int,
    seed: int,
    purpose: str,
) -> tuple[tuple[Member, ...], tuple[Member, ...]]:
    """Divide the items into (train, held out) such that no family is on both sides.

    Families of the same classes (matched ones, those of one class alone) are divided among themselves: in
    seeded order a family is held out where that brings the counts of its classes, summed up, nearer to their
    target. The target is ``share``, or less where that would be over ``limit`` items of a class. A class of
    which nothing is held out gives its smallest family. Held-out items past ``limit`` are left out
    altogether, by whole units (a unit is a matched pair, which lies in one family). Both sides come in seeded
    order, items of one unit side by side. A class of one family is not divided: the caller finds one side
    without it.
    """
    chosen = _held_out_families(
        items, of_class=of_class, share=share, limit=limit, seed=seed, purpose=f"{purpose} families"
    )
    train: list[Member] = []
    heldout: list[Member] = []
    room = Counter(dict.fromkeys(map(of_class, items), limit))
    in_order = seeded_order(items, unit, seed=seed, purpose=f"{purpose} items")
    for _, members in itertools.groupby(in_order, key=unit):
        together = list(members)
        if together[0].family not in chosen:
            train += together
            continue
        counts = Counter(map(of_class, together))
        if all(count <= room[name] for name, count in counts.items()):
            room -= counts
            heldout += together
    return tuple(train), tuple(heldout)


def _held_out_families(
    items: Sequence[Member], *, of_class: Callable[[Member], str], share: float, limit: int, seed: int, purpose: str
) -> set[str]:
    """The families that :func:`split_by_family` holds out."""
    totals = Counter(map(of_class, items))
    families: dict[str, Counter[str]] = {}
    for item in items:
        families.setdefault(item.family, Counter())[of_class(item)] += 1
    missing: dict[frozenset[str], dict[str, float]] = {}
    for counts in families.values():
        targets = missing.setdefault(frozenset(counts), dict.fromkeys(counts, 0.0))
        for name, count in counts.items():
            targets[name] += count * min(share, limit / totals[name])
    ordered = seeded_order(families, str, seed=seed, purpose=purpose)
    chosen: set[str] = set()
    held: Counter[str] = Counter()

    def uses_up_a_class(family: str) -> bool:
        return any(held[name] + count == totals[name] for name, count in families[family].items())

    def hold_out(family: str) -> None:
        chosen.add(family)
        held.update(families[family])

    for family in ordered:
        counts = families[family]
        targets = missing[frozenset(counts)]
        gain = sum(abs(targets[name]) - abs(targets[name] - count) for name, count in counts.items())
        if gain > 0:
            hold_out(family)
            for name, count in counts.items():
                targets[name] -= count
    for name in totals:
        if not held[name]:
            candidates = [family for family in ordered if families[family][name]]
            hold_out(min(candidates, key=lambda f: (uses_up_a_class(f), families[f].total())))
    return chosen


def shared_prompts(some: Iterable[tuple[str, str]], others: Iterable[tuple[str, str]]) -> list[str]:
    """Prompts (text, where it is) whose normal form is in both, quoted, with where each is in either."""
    by_form = {normalised(text): where for text, where in some}
    found: dict[str, str] = {}
    for text, where in others:
        form = normalised(text)
        if form in by_form:
            found.setdefault(form, f"{quoted(text)} ({by_form[form]}; {where})")
    return list(found.values())
