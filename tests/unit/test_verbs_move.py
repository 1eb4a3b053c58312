"""``move``: what it refuses, whom it asks, and what is left of it where a step fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.desks import Desk, Live, M, desks, grant, guest, region

from memconsole.actions import GuestResume, Move
from memconsole.backend import steps
from memconsole.backend.foreseen import desk_after
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.revoke import move
from memconsole.backend.stores import memfd
from memconsole.backend.verbs import moves
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, KernelRefused
from memconsole.model import GrantState, GuestKind, Refusal, Region

SECRET = b"kept"


class Arena:
    """The dax store as far as a move knows it, its files memfds; ``did`` is what was asked of it."""

    NAME = "dax"
    FAULTS = COUNTED = CARRIED = False
    EMPTIED_PROVES = CUTS = True

    def __init__(self) -> None:
        self.did: list[str] = []
        self.full = False
        self.spoils = False
        self.keeps = False

    def reserve_refusals(self, size: int, *_: object, **__: object) -> tuple[Refusal, ...]:
        if size % (2 * M):
            return (Refusal("BadSize", f"cannot reserve {size} bytes", "it has clusters of 2M", "make it 6M"),)
        return (Refusal("NoMemory", "cannot reserve", "arena lab has 0 free", "make it smaller"),) if self.full else ()

    def grant_refusals(self, grant: object) -> tuple[Refusal, ...]:
        lazy = getattr(grant, "lazy", False)
        return (Refusal("NotLazy", "it is lazy", "no userfaultfd", "leave --lazy out"),) if lazy else ()

    def fresh_segment(self, name: str, index: int, size: int, *_: object) -> int:
        fd = memfd.fresh_segment(name, index, size)
        self.did.append("fresh")
        return fd

    def describe(self, fds: object, region: Region, grants: object = ()) -> None:
        self.did.append("describe")
        if self.spoils:
            raise KernelRefused("setxattr", 28, what="an arena cannot be written to")

    def settle(self, name: str, index: int, kept: int, gone: int) -> None:
        self.did.append("settle")

    def drop_fresh(self, name: str, index: int) -> None:
        self.did.append("drop")

    def empty_segments(self, fds: list[int]) -> None:
        if self.keeps:
            raise KernelRefused("ftruncate", 16, what="a page of it is still pinned")
        self.did.append("empty")
        memfd.empty_segments(fds)

    def readable_fd(self, fd: int) -> int:
        return os.dup(fd)

    def promised_bytes(self, *_: object) -> int:
        return 0

    def close(self) -> None:
        pass


def with_arena(desk: Desk) -> Arena:
    store = Arena()
    stores: Any = {"memfd": memfd, "dax": store}
    desk.__dict__["stores"] = stores
    return store


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A region that a guest with an agent maps."""
    facts = {"regions": (region(),), "guests": (guest(),), "grants": (grant(),), "live": (Live("db"),), "frames": ()}
    with desks(tmp_path, **facts, reaching=((4000,), ())) as made:  # type: ignore[arg-type]
        made.tree.write("/proc/kpageflags", bytes(512))
        os.pwrite(made.fds("web")[0], SECRET, M)
        yield made


def run(desk: Desk, work: PreparedAction) -> None:
    assert work.refusals == []
    desk.carry(steps.run("move", work.steps))


def contents(desk: Desk) -> bytes:
    return os.pread(desk.fds("web")[0], len(SECRET), M)


def test_the_guest_is_asked_and_offered_it_again(desk: Desk) -> None:
    arena = with_arena(desk)
    work = moves.move_region(desk, Move("web", "dax"))
    assert [step.id for step in work.steps] == ["ask-g1", "move", "offer"]
    run(desk, work)
    assert desk.lives("db").did == ["unmap g1", "offer g1"]
    moved = desk.state.regions["web"]
    assert (moved.store, moved.page_size, moved.segments[0].inode) == ("dax", 4096, os.fstat(desk.fds("web")[0]).st_ino)
    assert contents(desk) == SECRET
    assert arena.did == ["fresh", "describe", "settle"], "it says what it is before the ledger means it"
    assert [each.state for each in work.change.grants] == [GrantState.MAPPED]
    assert desk.custody.names() == ["region:web:0"]
    assert "digest" in work.text


def test_it_goes_back(desk: Desk) -> None:
    arena = with_arena(desk)
    run(desk, moves.move_region(desk, Move("web", "dax")))
    arena.did.clear()
    run(desk, moves.move_region(desk, Move("web", "memfd")))
    assert desk.state.regions["web"].store == "memfd"
    assert arena.did == ["settle", "empty", "drop"], "its name stands for nothing there before it is emptied"
    assert contents(desk) == SECRET


@pytest.mark.parametrize("trouble", ["spoils", "digest"])
def test_a_copy_that_cannot_be_kept_leaves_the_region_as_it_was(
    desk: Desk, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = with_arena(desk)
    arena.spoils = trouble == "spoils"
    if trouble == "digest":
        said = iter(["before", "after"])
        monkeypatch.setattr(move, "_digest", lambda _: next(said))
    before = desk.state.regions["web"]
    with pytest.raises((KernelRefused, GuestError)) as failed:
        run(desk, moves.move_region(desk, Move("web", "dax")))
    assert failed.value.code in {"Kernel", "ContentsChanged"}
    assert desk.lives("db").did == ["unmap g1", "offer g1"], "and its guest has it again"
    assert desk.state.regions["web"] == before
    assert arena.did[-1] == "drop"
    assert desk.custody.names() == ["region:web:0"]
    assert contents(desk) == SECRET


def test_an_old_file_that_cannot_be_emptied_is_meant_again(desk: Desk) -> None:
    arena = with_arena(desk)
    run(desk, moves.move_region(desk, Move("web", "dax")))
    arena.keeps = True
    with pytest.raises(KernelRefused, match="pinned"):
        run(desk, moves.move_region(desk, Move("web", "memfd")))
    assert desk.state.regions["web"].store == "dax"
    assert desk.custody.names() == ["region:web:0"]
    assert contents(desk) == SECRET


def test_a_guest_that_does_not_give_it_back_keeps_it(desk: Desk) -> None:
    arena = with_arena(desk)
    desk.lives("db").unmaps = False
    with pytest.raises(GuestError, match="does not give web back"):
        run(desk, moves.move_region(desk, Move("web", "dax")))
    assert (arena.did, desk.state.regions["web"].store) == ([], "memfd")


def test_a_guest_that_does_not_map_it_again_is_told_of(desk: Desk) -> None:
    with_arena(desk)
    live = desk.lives("db")
    work = moves.move_region(desk, Move("web", "dax"))
    for step in work.steps[:2]:
        desk.carry(steps.run("move", [step]))
    live.trouble = GuestError("guest db does not answer", "its agent said nothing", "")
    desk.carry(steps.run("move", work.steps[2:]))
    assert "db did not map it again" in work.text
    assert [each.state for each in work.change.grants] == [GrantState.OFFERED]
    assert desk.state.regions["web"].store == "dax"


def test_what_custody_holds_of_a_move_that_was_cut_short_says_where_it_ends(desk: Desk) -> None:
    arena = with_arena(desk)
    moving = move.move_region(desk, desk.state.regions["web"], arena, 4096)  # type: ignore[arg-type]
    record = next(moving)
    arena.did.clear()
    move.finish_moves(desk)
    assert arena.did == ["settle", "drop"], "it gives the name up"
    assert desk.state.regions["web"].store == "memfd"
    moving.close()
    moving = move.move_region(desk, desk.state.regions["web"], arena, 4096)  # type: ignore[arg-type]
    record = next(moving)
    desk.record(record)
    old = os.dup(desk.fds("web")[0])
    move.finish_moves(desk)
    assert os.fstat(old).st_size == 0
    fd, _ = desk.custody.get("region:web:0")
    assert os.pread(fd, len(SECRET), M) == SECRET
    os.close(fd)
    os.close(old)


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (Move("nothing", "dax"), "NoSuchRegion"),
        (Move("web", "tape"), "NoSuchStore"),
        (Move("web", "memfd"), "SameStore"),
        (Move("odd", "dax"), "BadSize"),
        (Move("lost", "dax"), "RegionLost"),
        (Move("theirs", "dax"), "Adopted"),
        (Move("slow", "dax"), "NotLazy"),
        (Move("fast", "memfd"), "Pinned"),
    ],
)
def test_what_cannot_be_moved_is_refused_by_name(tmp_path: Path, action: Move, code: str) -> None:
    regions = [region(name) for name in ("web", "lost", "slow", "fast")]
    regions += [region("odd", 5 * M), replace(region("theirs"), store="adopted")]
    grants = (grant("g1", "slow", lazy=True), grant("g2", "fast", dma="0000:00:04.0"))
    with desks(tmp_path, regions=tuple(regions), guests=(guest(),), grants=grants, lost=frozenset({"lost"})) as desk:
        with_arena(desk)
        fast = replace(desk.state.regions["fast"], store="dax")
        desk.change(StateChange(regions=(fast,)))
        work = moves.move_region(desk, action)
        assert [each.code for each in work.refusals] == [code]
        assert work.steps == []
        assert work.refusals[0].remedy


def test_a_full_store_is_refused_and_says_which_region(desk: Desk) -> None:
    with_arena(desk).full = True
    (refusal,) = moves.move_region(desk, Move("web", "dax")).refusals
    assert (refusal.code, refusal.what) == ("NoMemory", "region web cannot be moved to the dax store")
    assert "arena lab has 0 free" in refusal.why


def test_nothing_goes_to_a_store_whose_files_cannot_be_cut_and_what_is_there_leaves_it(desk: Desk) -> None:
    arena = with_arena(desk)
    run(desk, moves.move_region(desk, Move("web", "dax")))
    arena.CUTS = arena.EMPTIED_PROVES = False
    run(desk, moves.move_region(desk, Move("web", "memfd")))
    assert (desk.state.regions["web"].store, contents(desk)) == ("memfd", SECRET)
    assert desk.state.quarantine == {}, "its frames are not counted by the kernel"
    arena.did.clear()
    (refusal,) = moves.move_region(desk, Move("web", "dax")).refusals
    assert (refusal.code, arena.did) == ("NoCopy", [])


def test_who_has_no_agent_and_uses_it_refuses_it(tmp_path: Path) -> None:
    live = Live("db", has_agent=False)
    facts = {"regions": (region(),), "guests": (guest(),), "grants": (grant(),), "live": (live,)}
    with desks(tmp_path, **facts, reaching=((4000,),)) as desk:  # type: ignore[arg-type]
        with_arena(desk)
        (refusal,) = moves.move_region(desk, Move("web", "dax")).refusals
        assert (refusal.code, refusal.why[:14]) == ("StillMapped", "processes 4000")
        assert "memconsole revoke g1" in refusal.remedy


def test_a_qemu_is_saved_and_comes_back_by_itself(tmp_path: Path) -> None:
    live = Live("db", kind=GuestKind.QEMU, ram="g1")
    facts = {"regions": (region(),), "guests": (guest(kind=GuestKind.QEMU),), "grants": (grant(),), "live": (live,)}
    with desks(tmp_path, **facts, reaching=((4000,),)) as desk:  # type: ignore[arg-type]
        with_arena(desk)
        work = moves.move_region(desk, Move("web", "dax"))
        assert [step.id for step in work.steps] == ["suspend", "move"]
        assert "started again from its saved state" in work.note
        assert GuestResume("db") not in work.then, "only once it was saved"


def test_what_comes_after_it_is_planned_on_the_other_store(desk: Desk) -> None:
    with_arena(desk)
    after: Any = desk_after(desk, [Move("web", "dax")])
    assert after.state.regions["web"].store == "dax"
    assert after.foreseen.made == frozenset()
    assert after.promised_bytes() == desk.promised_bytes()
