"""A Snapshot and what changed give the next Snapshot, whatever changed and in whatever order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.synthetic import snapshot

from memconsole.backend.wire import delta
from memconsole.errors import WireError
from memconsole.model import Host, Memory, Region, RegionState, Snapshot

HOST = Host("h", "7.3", "x86_64", "b", 2, 4096, 1.0, "0")
regions = st.builds(
    Region,
    name=st.sampled_from(["a", "b", "c", "d"]),
    store=st.just("memfd"),
    size=st.integers(0, 3),
    page_size=st.just(4096),
    state=st.sampled_from(list(RegionState)),
)
snapshots = st.builds(
    lambda taken, found: Snapshot(taken_ns=taken, host=HOST, memory=Memory(1, 1, 1), regions=tuple(found)),
    st.integers(0, 5),
    st.lists(regions, max_size=5),  # names may even be there twice
)


def over_the_wire(found: delta.Delta) -> delta.Delta:
    return msgspec.json.decode(msgspec.json.encode(found), type=delta.Delta)


@given(snapshots, snapshots)
def test_old_and_delta_give_new(old: Snapshot, new: Snapshot) -> None:
    assert delta.apply(old, over_the_wire(delta.between(old, new))) == new


def test_one_entity_of_many_travels_alone() -> None:
    old = snapshot(500, 50)
    changed = msgspec.structs.replace(old.regions[7], state=RegionState.RESTORED)
    new = msgspec.structs.replace(old, regions=(*old.regions[:7], changed, *old.regions[8:]), guests=old.guests[:-1])
    found = delta.between(old, new)
    assert found == delta.Delta(changed={"regions": [changed]}, removed={"guests": [old.guests[-1].name]})
    assert len(msgspec.json.encode(found)) * 100 < len(msgspec.json.encode(new))
    assert delta.apply(old, over_the_wire(found)) == new


def test_what_is_new_comes_last_or_the_whole_table_travels() -> None:
    old = snapshot(4, 2)
    extra = msgspec.structs.replace(old.regions[0], name="zz")
    behind = delta.between(old, msgspec.structs.replace(old, regions=(*old.regions, extra)))
    assert behind.changed == {"regions": [extra]}
    before = delta.between(old, msgspec.structs.replace(old, regions=(extra, *old.regions)))
    assert len(before.fields["regions"]) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        delta.Delta(changed={"gaps": []}),  # a field that travels whole
        delta.Delta(changed={"regions": [{"name": 7}]}),
        delta.Delta(fields={"host": None}),
    ],
)
def test_a_delta_that_cannot_be_read_is_named(wrong: delta.Delta) -> None:
    with pytest.raises(WireError):
        delta.apply(snapshot(1, 1), wrong)


def test_a_piece_that_does_not_follow_is_named() -> None:
    old = snapshot(1, 1)
    assert delta.advance(None, delta.Watched(1, snapshot=old)) == (1, old)
    with pytest.raises(WireError):
        delta.advance((1, old), delta.Watched(3, base=2, changes=delta.Delta()))
    with pytest.raises(WireError):
        delta.advance(None, delta.Watched(1, base=0, changes=delta.Delta()))
