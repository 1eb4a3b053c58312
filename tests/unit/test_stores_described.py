"""What a range says of itself, as bytes: whole, torn at every block, of others, of a newer memconsole, and spoiled."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memconsole.backend.stores import described
from memconsole.backend.stores.described import COPY, FORMAT, HEAD, UNIT, Description, Kind, Piece
from memconsole.errors import BadFile
from memconsole.model import Access, Grant, GrantState, Region, RegionState

SIZE = 64 * UNIT
WHERE = "/dev/dax0.0"
ROOM = 64 << 10
"""Bytes of a copy that these tests use: what lies behind is never looked at."""


def piece(name: str, unit: int, units: int = 1) -> Piece:
    region = Region(name, "devdax", units * UNIT, 4096, RegionState.RESERVED)
    grant = Grant("g1", name, "db", 0, units * UNIT, Access.RW, GrantState.MAPPED)
    return Piece(name=name, start=unit * UNIT, size=units * UNIT, region=region, grants=(grant,))


def said(*pieces: Piece) -> Description:
    return Description(name="lab", host="abc", created_ns=7, pieces=pieces)


class Memory:
    """The two copies of a range, and the way a change is written over the older one, block by block."""

    def __init__(self) -> None:
        self.raw = bytearray(2 * ROOM)

    def read(self) -> described.Read:
        return described.read(bytes(self.raw[:ROOM]), bytes(self.raw[ROOM:]), SIZE, WHERE)

    def change(self, description: Description) -> tuple[int, bytes]:
        found = self.read()
        raw = described.written(description, found.generation + 1, SIZE, WHERE)
        return found.older * ROOM, raw

    def write(self, description: Description) -> None:
        at, raw = self.change(description)
        self.raw[at : at + len(raw)] = raw


def test_what_was_written_last_is_what_is_read() -> None:
    memory = Memory()
    assert memory.read().empty
    for number in range(1, 6):
        wanted = said(*(piece(f"r{each}", each) for each in range(1, number)))
        memory.write(wanted)
        found = memory.read()
        assert (found.description, found.generation) == (wanted, number)


@pytest.mark.parametrize("block", [64, 512, 4096])
def test_a_change_that_is_torn_at_any_block_leaves_what_was_there(block: int) -> None:
    memory = Memory()
    before, after = said(*(piece(f"r{each}", each) for each in range(1, 40))), said(piece("other", 3, 2))
    for older, newer in ((before, after), (after, before)):
        memory.write(older)
        memory.write(older)
        at, raw = memory.change(newer)
        for end in range(0, len(raw), block):
            torn = Memory()
            torn.raw[:] = memory.raw
            torn.raw[at : at + end] = raw[:end]
            whole = torn.raw[at : at + len(raw)] == raw  # what lacked was here before, and is the same
            assert torn.read().description == (newer if whole else older)
        memory.raw[at : at + len(raw)] = raw
        assert memory.read().description == newer


def test_blocks_that_arrive_in_any_order_say_the_one_or_the_other() -> None:
    memory = Memory()
    older, newer = said(*(piece(f"r{each}", each) for each in range(1, 30))), said(*(piece("n", 1, 9),))
    memory.write(older)
    memory.write(older)
    at, raw = memory.change(newer)
    dice = random.Random(17)
    blocks = range(0, len(raw), 64)
    for _ in range(300):
        torn = Memory()
        torn.raw[:] = memory.raw
        for start in dice.sample(blocks, dice.randrange(len(blocks))):
            torn.raw[at + start : at + min(start + 64, len(raw))] = raw[start : start + 64]
        assert torn.read().description in {older, newer}


def test_the_first_write_of_all_that_is_torn_was_never_finished() -> None:
    raw = described.written(said(), 1, SIZE, WHERE)
    for end in range(len(raw)):
        found = described.read(raw[:end] + bytes(ROOM - end), bytes(ROOM), SIZE, WHERE)
        assert found.description is None
        assert found.empty or end < len(described.MAGIC)


def test_a_range_whose_copies_are_both_torn_is_left_alone() -> None:
    memory = Memory()
    memory.write(said())
    memory.write(said())
    memory.raw[100] ^= 1
    memory.raw[ROOM + 100] ^= 1
    with pytest.raises(BadFile, match="neither copy"):
        memory.read()


def test_foreign_bytes_are_no_description() -> None:
    found = described.read(b"somebody's" + bytes(COPY), bytes(COPY), SIZE, WHERE)
    assert found.description is None
    assert not found.empty


def test_what_a_newer_memconsole_wrote_is_named_and_left() -> None:
    memory = Memory()
    memory.write(said())
    body = b'{"anything": true}'
    head = HEAD.pack(described.MAGIC, FORMAT + 1, 0, 9, len(body), SIZE, bytes(32))[: HEAD.size - 32]
    memory.raw[ROOM : ROOM + HEAD.size + len(body)] = head + described._digest(head, body) + body
    with pytest.raises(BadFile, match="newer memconsole"):
        memory.read()


def test_a_description_of_another_range_is_named() -> None:
    raw = described.written(said(), 1, SIZE, WHERE)
    with pytest.raises(BadFile, match="does not say"):
        described.read(raw, bytes(COPY), SIZE - UNIT, WHERE)


@pytest.mark.parametrize(
    "pieces",
    [
        (piece("r", 0),),
        (piece("r", 63, 2),),
        (piece("r", 1, 2), piece("s", 2)),
        (piece("r", 1), piece("r", 2)),
        (piece("../r", 1),),
        (Piece(name="r", start=UNIT + 4096, size=UNIT),),
        (Piece(name="r", start=UNIT, size=0),),
        (Piece(name="r", start=UNIT, size=-UNIT),),
        (msgspec.structs.replace(piece("r", 1), name="s"),),
    ],
)
def test_what_cannot_be_is_not_believed(pieces: tuple[Piece, ...]) -> None:
    raw = described.written(said(*pieces), 1, SIZE, WHERE)
    with pytest.raises(BadFile, match="does not say what it is"):
        described.read(raw, bytes(COPY), SIZE, WHERE)


def test_a_range_that_describes_too_much_says_so_before_anything_is_written() -> None:
    many = said(*(piece(f"region-{each:05}", each) for each in range(1, 5000)))
    with pytest.raises(BadFile, match="no room for another region"):
        described.written(many, 1, 5000 * UNIT, WHERE)


def test_a_thousand_regions_are_described() -> None:
    many = said(*(piece(f"region-{each:05}", each) for each in range(1, 1001)))
    total = 1001 * UNIT
    assert described.read(described.written(many, 1, total, WHERE), bytes(COPY), total, WHERE).description == many


def test_room_is_found_where_something_was_released() -> None:
    described_now = said(piece("a", 1, 2), piece("c", 5, 1))
    assert described.place_for(described_now, 2 * UNIT, SIZE) == 3 * UNIT
    assert described.place_for(described_now, 3 * UNIT, SIZE) == 6 * UNIT
    assert described.place_for(described_now, SIZE, SIZE) is None
    assert described.free(described_now, SIZE) == (SIZE - 4 * UNIT, SIZE - 6 * UNIT)
    assert described.place_for(said(), SIZE - UNIT, SIZE + 4096) == UNIT


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_make_anything_but_a_description_or_a_named_refusal(data: st.DataObject) -> None:
    raw = bytearray(described.written(said(piece("a", 1), piece("b", 2)), 3, SIZE, WHERE))
    if data.draw(st.booleans()):  # a whole copy around a body that is anything
        body = data.draw(st.binary(max_size=400))
        head = HEAD.pack(described.MAGIC, FORMAT, 0, 4, len(body), SIZE, bytes(32))[: HEAD.size - 32]
        raw = bytearray(head + described._digest(head, body) + body)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    cut = bytes(raw[: data.draw(st.integers(0, len(raw)))])
    assert described.copy_of(cut, SIZE).kind in Kind
    other = data.draw(st.binary(max_size=100))
    with contextlib.suppress(BadFile):
        found = described.read(cut, other, SIZE, WHERE)
        assert found.description is None or found.description.name == "lab"
