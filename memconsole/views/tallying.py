"""Sums over many entities, kept from one Snapshot to the next: only what changed is counted anew."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Tally(Generic[T]):
    """What entities come to, by key: each adds the amounts that ``amounts`` says of it.

    An entity that is the same object as before is not looked at again, which Snapshots are made for
    (:func:`memconsole.differ.settled`).
    """

    def __init__(self, amounts: Callable[[T], Iterable[tuple[Hashable, int]]]) -> None:
        self._amounts = amounts
        self._items: Sequence[T] = ()
        self._sums: Counter[Hashable] = Counter()

    def follow(self, items: Sequence[T]) -> Counter[Hashable]:
        """The sums over these entities."""
        if items is not self._items:
            gone, came = changed(self._items, items)
            for item in gone:
                self._sums.subtract(dict(self._amounts(item)))
            for item in came:
                self._sums.update(dict(self._amounts(item)))
            self._items = items
        return self._sums


def changed(old: Sequence[T], new: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """What of two sequences is to be counted: out of the first one, and into it; the same objects are not."""
    if len(old) == len(new):
        pairs = [*itertools.compress(zip(old, new, strict=True), map(operator.is_not, old, new))]
        return [before for before, _ in pairs], [after for _, after in pairs]
    begin = _alike(old, new)
    old, new = old[begin:], new[begin:]
    end = _alike(old[::-1], new[::-1])
    return old[: len(old) - end], new[: len(new) - end]


def _alike(old: Sequence[T], new: Sequence[T]) -> int:
    """How many of their first items are the same objects."""
    same = map(operator.is_, old, new)
    return next((at for at, alike in enumerate(same) if not alike), min(len(old), len(new)))
