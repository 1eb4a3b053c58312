"""Sums kept from one Snapshot to the next: whatever became of the entities, they are those counted from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from memconsole.views.tallying import Tally, changed


class Thing(NamedTuple):
    """An entity with a state and a size."""

    state: str
    size: int


def amounts(thing: Thing) -> list[tuple[str, int]]:
    return [(thing.state, 1), ("size", thing.size)]


KNOWN = [Thing(state, size) for state in "abc" for size in (1, 7, 4096)]


@given(st.lists(st.lists(st.sampled_from(KNOWN)), min_size=1))
def test_sums_are_those_counted_from_nothing(walk: Sequence[Sequence[Thing]]) -> None:
    kept = Tally(amounts)
    for things in walk:
        found = kept.follow(things)
        assert +found == +Tally(amounts).follow([*things])


def test_what_is_the_same_object_is_not_looked_at_again() -> None:
    looked: list[Thing] = []

    def noting(thing: Thing) -> list[tuple[str, int]]:
        looked.append(thing)
        return amounts(thing)

    kept, things = Tally(noting), [*KNOWN]
    kept.follow(things)
    looked.clear()
    other = Thing("d", 3)
    kept.follow([*things[:4], other, *things[5:]])
    assert looked == [things[4], other]
    looked.clear()
    kept.follow([*things[:4], other, other, *things[5:]])
    assert looked == [other]


@given(st.lists(st.sampled_from(KNOWN)), st.lists(st.sampled_from(KNOWN)))
def test_what_neither_went_nor_came_is_in_both(old: Sequence[Thing], new: Sequence[Thing]) -> None:
    gone, came = changed(old, new)
    assert sorted([*new, *gone]) == sorted([*old, *came])
