"""Contents moved to fresh frames: what custody and memory hold whenever the ledger is written, and what becomes of the
old frames.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.desks import Desk, M, desks, grant, guest, region

from memconsole.backend.ledger.state import EventRecord, Record, StateChange
from memconsole.backend.revoke import move, pins
from memconsole.errors import Denied, GuestError, KernelRefused
from memconsole.extents import Extent, Flag
from memconsole.model import Quarantine, RevokeOutcome

PAGE = 4096
FRAMES = (Extent(0, 16, 4, Flag.PRESENT), Extent(8, 32, 2, Flag.PRESENT))
FREE, DIRTY, BUDDY, ANON, PINNED = 0, 1 << 4, 1 << 10, 1 << 12 | 1 << 14, 1 << 14
SECRET = b"kept"


def flags(desk: Desk, **words: int) -> None:
    """Write /proc/kpageflags: every frame is free, but those named ``pN`` have this word."""
    table = [FREE] * 64
    for name, word in words.items():
        table[int(name[1:])] = word
    desk.tree.write("/proc/kpageflags", struct.pack("<64Q", *table))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desks(tmp_path, regions=(region(),), guests=(guest(),), grants=(grant(),), frames=FRAMES) as made:
        os.pwrite(made.fds("web")[0], SECRET, M)
        flags(made)
        yield made


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def held(desk: Desk, name: str) -> int:
    """The inode that custody holds under a name."""
    fd, _ = desk.custody.get(name)
    try:
        return inode(fd)
    finally:
        os.close(fd)


def kinds(desk: Desk) -> list[str]:
    return [each.kind for each in desk.records if isinstance(each, EventRecord)]


# --- the move itself ----------------------------------------------------------------------------------------------


def test_the_ledger_means_the_fresh_file_before_the_old_one_is_emptied(desk: Desk) -> None:
    (old,) = desk.fds("web")
    before = inode(old)
    kept = os.dup(old)
    moving = move.move_segment(desk, grant(), 0)
    record: Record = next(moving)
    assert isinstance(record, EventRecord)
    (moved,) = record.change.regions
    assert [each.id for each in record.change.quarantine] == ["g1"]
    assert held(desk, "region:web:0") == before, "custody has the old file under the region's name"
    assert held(desk, "fresh:web:0") == moved.segments[0].inode != before
    assert "quarantine:g1" in desk.custody.names()
    assert os.fstat(kept).st_size == 4 * M, "and nothing was taken from it yet"
    record = moving.send(desk.record(record))
    assert isinstance(record, EventRecord)
    assert record.change.without_quarantine == ("g1",), "no old frame is pinned"
    assert os.fstat(kept).st_size == 0
    assert held(desk, "region:web:0") == moved.segments[0].inode
    assert "fresh:web:0" not in desk.custody.names()
    with pytest.raises(StopIteration) as ended:
        moving.send(desk.record(record))
    assert ended.value.value == (RevokeOutcome.PROVED, "")
    os.close(kept)
    assert os.pread(desk.fds("web")[0], len(SECRET), M) == SECRET
    assert desk.custody.names() == ["region:web:0"]


def test_a_move_that_cannot_be_recorded_leaves_the_region_as_it_was(desk: Desk) -> None:
    before = inode(desk.fds("web")[0])
    moving = move.move_segment(desk, grant(), 0)
    next(moving)
    with pytest.raises(KernelRefused, match="cannot grow"):
        moving.throw(KernelRefused("ftruncate", 28, what="the ledger cannot grow"))
    assert desk.custody.names() == ["region:web:0"]
    assert inode(desk.fds("web")[0]) == held(desk, "region:web:0") == before
    assert os.pread(desk.fds("web")[0], len(SECRET), M) == SECRET


def test_a_file_that_cannot_be_emptied_is_meant_again(desk: Desk) -> None:
    import fcntl

    before = desk.state.regions["web"]
    fcntl.fcntl(desk.fds("web")[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(KernelRefused, match="cannot be freed"):
        desk.carry(move.move_segment(desk, grant(), 0))
    assert kinds(desk) == ["moved", "moved"]
    assert desk.state.regions["web"] == before
    assert desk.state.quarantine == {}
    assert desk.custody.names() == ["region:web:0"]
    assert os.pread(desk.fds("web")[0], len(SECRET), M) == SECRET


def test_where_frames_are_not_shown_nothing_is_quarantined_and_that_is_said(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), grants=(grant(),)) as desk:
        end = desk.carry(move.move_segment(desk, grant(), 0))
        assert (end.outcome, desk.state.quarantine) == (RevokeOutcome.CUT, {})
        assert end.note == "pins cannot be ruled out: page flags are not shown"
        assert kinds(desk) == ["moved"]


def test_where_page_flags_are_not_shown_the_end_is_a_cut(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> list[Extent]:
        raise Denied("/proc/kpageflags", "the kernel shows it to CAP_SYS_ADMIN only", "run as root")

    monkeypatch.setattr(pins, "pinned", denied)
    end = desk.carry(move.move_segment(desk, grant(), 0))
    assert (end.outcome, desk.state.quarantine) == (RevokeOutcome.CUT, {})
    assert kinds(desk) == ["moved", "unpinned"]


def test_frames_that_are_pinned_are_quarantined_and_no_others(desk: Desk) -> None:
    flags(desk, p17=PINNED, p18=PINNED, p32=PINNED | DIRTY, p33=BUDDY, p19=ANON)
    end = desk.carry(move.move_segment(desk, grant(), 0))
    assert end == (RevokeOutcome.QUARANTINED, "8K in 1 runs of frames are pinned")
    (kept,) = desk.state.quarantine.values()
    assert (kept.id, kept.size, kept.region, kept.guest) == ("g1", 2 * PAGE, "web", "db")
    assert kinds(desk) == ["moved", "quarantined"]
    assert "quarantine:g1" in desk.custody.names()


def test_a_second_move_for_one_grant_has_a_quarantine_of_its_own(desk: Desk) -> None:
    flags(desk, p17=PINNED)
    desk.carry(move.move_segment(desk, grant(), 0))
    desk.carry(move.move_segment(desk, grant(), 0))
    assert sorted(desk.state.quarantine) == ["g1", "g1.2"]


# --- afterwards ---------------------------------------------------------------------------------------------------


def test_frames_are_let_go_once_their_pins_drop(desk: Desk) -> None:
    flags(desk, p17=PINNED, p32=PINNED)
    desk.carry(move.move_segment(desk, grant(), 0))
    desk.records.clear()
    desk.carry(move.recheck_quarantine(desk))
    assert desk.records == [], "nothing changed, nothing is recorded"
    flags(desk, p17=PINNED)
    desk.carry(move.recheck_quarantine(desk))
    assert kinds(desk) == ["quarantined"]
    assert desk.state.quarantine["g1"].size == PAGE
    flags(desk)
    desk.carry(move.recheck_quarantine(desk))
    assert kinds(desk) == ["quarantined", "unpinned"]
    assert (desk.state.quarantine, desk.custody.names()) == ({}, ["region:web:0"])


def test_a_quarantine_whose_table_is_lost_is_let_go(desk: Desk) -> None:
    desk.change(StateChange(quarantine=(Quarantine("g7", "web", "db", M, 1, "pinned"),)))
    desk.carry(move.recheck_quarantine(desk))
    assert desk.state.quarantine == {}


def test_a_copy_that_the_ledger_never_meant_is_thrown_away(desk: Desk) -> None:
    moving = move.move_segment(desk, grant(), 0)
    next(moving)
    (held_before,) = desk.fds("web")
    finish_after_death(desk)
    assert desk.custody.names() == ["region:web:0"]
    assert os.fstat(held_before).st_size == 4 * M


def test_a_move_that_the_ledger_means_is_carried_through(desk: Desk) -> None:
    (old,) = desk.fds("web")
    moving = move.move_segment(desk, grant(), 0)
    desk.record(next(moving))
    finish_after_death(desk)
    assert held(desk, "region:web:0") == desk.state.regions["web"].segments[0].inode
    assert os.fstat(old).st_size == 0
    fd, _ = desk.custody.get("region:web:0")
    assert os.pread(fd, len(SECRET), M) == SECRET
    os.close(fd)
    assert "quarantine:g1" in desk.custody.names(), "its frames are looked at again by the next upkeep"


def test_a_move_that_was_replaced_and_not_dropped_keeps_the_contents(desk: Desk) -> None:
    moving = move.move_segment(desk, grant(), 0)
    desk.record(next(moving))
    fd, payload = desk.custody.get("fresh:web:0")
    desk.custody.put("region:web:0", fd, payload)
    os.close(fd)
    finish_after_death(desk)
    fd, _ = desk.custody.get("region:web:0")
    assert os.pread(fd, len(SECRET), M) == SECRET
    os.close(fd)


@pytest.mark.parametrize("name", ["fresh:web:x", "fresh:gone:0"])
def test_what_is_no_copy_of_a_region_is_not_carried_through(desk: Desk, name: str) -> None:
    desk.custody.put(name, desk.fds("web")[0])
    move.finish_moves(desk)
    assert (name in desk.custody.names()) is (name == "fresh:web:x")
    assert os.pread(desk.fds("web")[0], len(SECRET), M) == SECRET


def finish_after_death(desk: Desk) -> None:
    """What the next control process does: custody and ledger are all it has. The one before ran no line more."""
    move.finish_moves(desk)


# --- whether it can be --------------------------------------------------------------------------------------------


def test_fresh_frames_are_wanted_for_what_is_there_and_no_more(desk: Desk) -> None:
    web = desk.state.regions["web"]
    assert move.why_not(desk, web, 0) == ""
    desk.change(StateChange(regions=(replace(web, name="more", size=1 << 40),)))
    assert move.why_not(desk, web, 0) == "4K of fresh frames are needed, 0 available"
    lost = replace(web, name="lost")
    assert move.why_not(desk, lost, 0) == "the memory of region lost is lost"


@pytest.mark.parametrize(("free", "why"), [(2, ""), (1, "4M of fresh frames are needed, 2M available")])
def test_huge_pages_come_out_of_their_pool(desk: Desk, free: int, why: str) -> None:
    desk.tree.pool(2 * M, 16, free)
    huge = replace(desk.state.regions["web"], page_size=2 * M)
    assert move.why_not(desk, huge, 0) == why


def test_nobody_is_told_of_a_copy_that_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise GuestError("the contents cannot be copied")

    monkeypatch.setattr(move, "_copy", full)
    with pytest.raises(GuestError, match="cannot be copied"):
        desk.carry(move.move_segment(desk, grant(), 0))
    assert desk.records == []
    assert desk.custody.names() == ["region:web:0"]
