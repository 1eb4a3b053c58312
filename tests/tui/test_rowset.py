"""Order, filter and change marks of a table's rows."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import synthetic

from memconsole.differ import settled
from memconsole.errors import UsageError
from memconsole.field import Field
from memconsole.fields import REGIONS
from memconsole.model import RegionState, Snapshot
from memconsole.views.widgets.rowset import RowSet

SNAPSHOT = synthetic.snapshot()


def rows(snapshot: Snapshot = SNAPSHOT) -> RowSet:
    made = RowSet(REGIONS, REGIONS.pick(None))
    made.load(snapshot.regions)
    return made


def names(made: RowSet) -> list[str]:
    return [made.key(row) for row in range(len(made))]


def field(name: str) -> Field:
    return next(field for field in REGIONS.fields if field.id == name)


def test_a_filter_finds_text_fields_and_their_absence() -> None:
    made = rows()
    made.filter("web")
    assert names(made) == ["web0-ram0", "web0-ram1", "web0-ram3"]
    made.filter("web size:64M")
    assert names(made) == ["web0-ram0"]
    made.filter("state:RESERVED")
    assert names(made) == ["spare6"]
    made.filter("!mapped !cache")
    assert names(made) == ["spare6"]
    made.filter("")
    assert len(made) == made.total == 10


def test_a_filter_looks_only_into_what_is_shown() -> None:
    made = rows()
    made.filter("grow")
    assert names(made) == []
    made.show([field("name"), field("seals")])
    assert len(made) == 10


def test_sorting_goes_by_value_and_leaves_the_unknown_last() -> None:
    made = rows()
    made.sort(field("size"))
    sizes = [made[row].size for row in range(len(made))]
    assert sizes == sorted(sizes)
    made.sort(field("runs"), reverse=True)
    known = [region.seen.runs for region in SNAPSHOT.regions if region.seen is not None]
    assert made[0].seen.runs == max(runs for runs in known if runs is not None)
    assert made[len(made) - 1].seen.runs is None


WORDS = ["web0", "db1", "ram", "spare", "64M", "!", "size:", ":", "mapped", "size>64M", "|", "(", ")", '"', "page:4K"]


def typed_in(made: RowSet, text: str) -> bool:
    """Type a filter; says whether its last letter left one that is none."""
    try:
        made.filter(text)
    except UsageError:
        return False
    return True


@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_typing_a_filter_letter_by_letter_finds_what_the_whole_finds(words: list[str]) -> None:
    text = " ".join(words)
    typed, whole = rows(), rows()
    for end in range(len(text)):
        typed_in(typed, text[:end])
    before = names(typed)
    if typed_in(typed, text):
        whole.filter(text)
        assert names(typed) == names(whole)
    else:
        assert names(typed) == before


def test_equal_entities_stay_the_same_objects() -> None:
    again = msgspec.json.decode(msgspec.json.encode(SNAPSHOT), type=type(SNAPSHOT))
    assert again.regions[0] is not SNAPSHOT.regions[0]
    kept = settled(SNAPSHOT, again)
    assert kept == again
    assert kept.regions is SNAPSHOT.regions
    grown = msgspec.structs.replace(again, regions=again.regions[1:])
    assert [new is old for new, old in zip(settled(SNAPSHOT, grown).regions, SNAPSHOT.regions[1:], strict=True)] == [
        True
    ] * 9


def test_what_changed_and_what_is_new_is_marked_until_the_next_load() -> None:
    made = rows()
    assert made.before == {}
    first = SNAPSHOT.regions[0]
    bigger = msgspec.structs.replace(first, size=first.size * 2, store="dax")
    new = msgspec.structs.replace(first, name="fresh")
    made.load((bigger, *SNAPSHOT.regions[1:], new))
    assert made.before == {"web0-ram0": first, "fresh": None}
    assert made.changed("web0-ram0", field("size")) == 1
    assert made.changed("web0-ram0", field("store")) == 2
    assert made.changed("web0-ram0", field("name")) == 0
    made.load(made.items)
    assert made.before == {}


CHANGES = st.dictionaries(st.integers(0, 9), st.sampled_from(["size", "state", "name", "equal"]), max_size=5)


@given(CHANGES, st.sampled_from([None, "size", "state"]), st.sampled_from(["", "web", "size>100M", "!mapped"]))
def test_rows_that_stay_in_place_are_as_rows_loaded_anew(changes: dict[int, str], by: str | None, text: str) -> None:
    regions = list(SNAPSHOT.regions)
    for at, what in changes.items():
        now = {"size": regions[at].size * 4, "state": RegionState.RESTORED, "name": f"other{at}"}
        regions[at] = msgspec.structs.replace(regions[at], **({what: now[what]} if what in now else {}))
    kept, anew = rows(), RowSet(REGIONS, REGIONS.pick(None))
    for made in (kept, anew):
        made.sort(field(by) if by else None)
        made.filter(text)
    assert kept.warm(1000) is False
    kept.load(regions)
    anew.load(regions)
    assert names(kept) == names(anew)
    assert kept.before.keys() == {kept.keys[at] for at, what in changes.items() if what != "equal"}
    kept.filter(f"{text} a")
    anew.filter(f"{text} a")
    assert names(kept) == names(anew)


@pytest.mark.parametrize("budget", [1, 3, 100])
def test_text_can_be_made_a_little_at_a_time(budget: int) -> None:
    made = rows()
    rounds = 0
    while made.warm(budget):
        rounds += 1
    assert rounds == (made.total - 1) // budget if budget < made.total else rounds == 0
    made.filter("spare6")
    assert names(made) == ["spare6"]


def test_rows_that_are_made_anew_each_time_stay_the_objects_they_were() -> None:
    def fresh(names: str) -> list[Any]:
        return [msgspec.structs.replace(SNAPSHOT.regions[0], name=name) for name in names]

    made = RowSet(REGIONS, REGIONS.pick(None))
    made.load(fresh("abc"))
    a, b, c = (made[row] for row in range(3))
    made.load(fresh("abd"))
    assert [made[row] is was for row, was in enumerate((a, b, c))] == [True, True, False]
    made.load([*fresh("ab"), msgspec.structs.replace(made[2], size=4096)])
    assert [made[row] is was for row, was in enumerate((a, b))] == [True, True]
    assert made[2].size == 4096
