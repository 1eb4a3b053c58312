"""The revoke ladder: which rung ends a climb, how strong that end is, and why a rung did not do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.children import killable
from support.desks import Desk, Live, M, Mount, desks, grant, guest, region
from support.waiting import LONG_S

from memconsole.backend.ledger.state import EventRecord
from memconsole.backend.revoke.ladder import Ladder
from memconsole.errors import GuestError
from memconsole.model import GuestKind, GuestState, RevokeOutcome, RevokeReport, Rung

KEEPS = ((4000,),)
"""Process 4000 reaches the region, whatever is done."""
LOST = frozenset({"web"})
"""The region's memory is lost, so that its contents cannot be moved."""


def canary(**more: Any) -> dict[str, Any]:
    """A canary, whose code is memconsole's own, on region ``web``."""
    kind = GuestKind.CANARY
    facts = {"regions": (region(),), "guests": (guest(kind=kind),), "grants": (grant(),), "live": (Live("db", kind),)}
    return facts | more


def process(**more: Any) -> dict[str, Any]:
    """A process, which may have handed on what it was given, on region ``web``."""
    return canary(guests=(guest(),), live=(Live("db"),)) | more


def climb(desk: Desk, at_most: Rung = Rung.KILL, within: float = 0.0) -> tuple[RevokeReport, Ladder]:
    ladder = Ladder(desk, grant(), within, at_most)
    return desk.carry(ladder.climb()), ladder


def live(desk: Desk) -> Live:
    found = desk.live_guest("db")
    assert found is not None
    return found


@pytest.fixture
def victim() -> Iterator[int]:
    """The PID of a process that may be stopped and killed."""
    with killable() as pid:
        yield pid


# --- ask ----------------------------------------------------------------------------------------------------------


def test_a_canary_that_unmaps_ends_it_at_the_first_rung(tmp_path: Path) -> None:
    with desks(tmp_path, **canary()) as desk:
        report, ladder = climb(desk)
        assert (report.rung, report.outcome, report.tried) == (Rung.ASK, RevokeOutcome.CUT, (Rung.ASK,))
        assert report.note == ""
        assert live(desk).did == ["unmap g1"]
        assert desk.records == [], "what its guest is made of pins nothing, and the contents stay where they are"
        assert ladder.change().without_grants == ("g1",)
        assert desk.withdrawn == ["g1"]


def test_a_process_that_unmaps_has_the_contents_moved_away_from_what_it_pinned(tmp_path: Path) -> None:
    with desks(tmp_path, **process()) as desk:
        os.pwrite(desk.fds("web")[0], b"kept", M)
        report, _ = climb(desk)
        assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.CUT)
        assert "pins cannot be ruled out" in report.note
        assert os.pread(desk.fds("web")[0], 4, M) == b"kept"
        assert [each.kind for each in desk.records if isinstance(each, EventRecord)] == ["moved"]


def test_what_was_unmapped_just_now_may_linger_and_is_waited_for_without_looking_at_every_process(
    tmp_path: Path,
) -> None:
    with desks(tmp_path, **canary(reaching=((4000,), (4000,), (4000,), ()))) as desk:
        report, _ = climb(desk, within=LONG_S)
        assert report.rung is Rung.ASK
        assert desk.narrow == 3, "the process that was seen is looked at until it is seen no more"
        assert desk.looks == 5


def test_a_grants_file_on_the_mount_is_barred_before_anybody_is_asked(tmp_path: Path) -> None:
    with desks(tmp_path, **canary()) as desk:
        desk.mount = Mount()
        report, _ = climb(desk)
        assert desk.mount.barred == {"g1"}
        assert report.outcome is RevokeOutcome.CUT


def test_processes_that_are_hidden_leave_it_unsure(tmp_path: Path) -> None:
    with desks(tmp_path, **canary(unseen="3 processes are hidden")) as desk:
        report, _ = climb(desk)
        assert (report.outcome, report.note) == (RevokeOutcome.QUARANTINED, "3 processes are hidden")


def test_a_guest_that_does_not_answer_is_quoted(tmp_path: Path) -> None:
    deaf = Live("db", GuestKind.CANARY, trouble=GuestError("db does not answer"))
    with desks(tmp_path, **canary(live=(deaf,), reaching=KEEPS)) as desk, pytest.raises(GuestError) as kept:
        climb(desk, Rung.ASK)
    assert kept.value.why == "ask: db does not answer; its memfd is held by 4000"
    assert kept.value.remedy == "memconsole revoke g1 --at-most protect"


def test_a_rung_that_is_not_tried_on_a_process_of_others_is_not_named_as_the_next(tmp_path: Path) -> None:
    with desks(tmp_path, **process(reaching=KEEPS)) as desk, pytest.raises(GuestError) as kept:
        climb(desk, Rung.ASK)
    assert kept.value.remedy == "memconsole revoke g1 --at-most copy"


def test_a_qemu_is_not_asked_for_memory_that_is_not_its_ram(tmp_path: Path) -> None:
    vm = Live("db", GuestKind.QEMU)
    facts = canary(guests=(guest(kind=GuestKind.QEMU),), live=(vm,), reaching=KEEPS)
    with desks(tmp_path, **facts) as desk, pytest.raises(GuestError, match="still mapped"):
        climb(desk, Rung.ASK)
    assert vm.did == []


# --- protect ------------------------------------------------------------------------------------------------------


def test_a_canary_that_does_not_answer_has_its_mapping_barred(tmp_path: Path) -> None:
    facts = canary(live=(Live("db", GuestKind.CANARY, unmaps=False),), reaching=((4000,), ()))
    with desks(tmp_path, **facts) as desk:
        desk.userfaults.served.add("g1")
        report, _ = climb(desk, Rung.PROTECT)
        assert (report.rung, report.outcome) == (Rung.PROTECT, RevokeOutcome.CUT)
        assert report.note.startswith("its mapping stays, without pages; ask: ")
        assert desk.userfaults.barred == {"g1"}
        assert report.tried == (Rung.ASK, Rung.PROTECT)


@pytest.mark.parametrize(
    ("facts", "served", "why"),
    [
        (process(reaching=KEEPS), True, "protect: a process that memconsole does not control could undo it"),
        (canary(reaching=KEEPS), False, "protect: its guest handed over no userfaultfd"),
        (canary(reaching=KEEPS), True, "protect: its memfd is held by 4000"),
    ],
)
def test_why_a_mapping_is_not_barred_is_said(tmp_path: Path, facts: dict[str, Any], served: bool, why: str) -> None:
    with desks(tmp_path, **facts) as desk:
        if served:
            desk.userfaults.served.add("g1")
        with pytest.raises(GuestError) as kept:
            climb(desk, Rung.PROTECT)
    assert why in kept.value.why


def test_a_file_on_the_mount_that_may_be_open_is_no_end(tmp_path: Path) -> None:
    with desks(tmp_path, **canary(reaching=((4000,), ()))) as desk:
        desk.userfaults.served.add("g1")
        desk.mount = Mount(open={"g1": "its file is open somewhere"})
        with pytest.raises(GuestError, match="still mapped") as kept:
            climb(desk, Rung.PROTECT)
        assert "protect: its file is open somewhere" in kept.value.why


# --- copy ---------------------------------------------------------------------------------------------------------


def test_the_contents_move_away_from_a_process_that_keeps_its_mapping(tmp_path: Path, victim: int) -> None:
    with desks(tmp_path, **process(live=(), reaching=((victim,), ()))) as desk:
        old = os.dup(desk.fds("web")[0])
        os.pwrite(old, b"kept", 0)
        report, _ = climb(desk, Rung.COPY)
        assert (report.rung, report.tried) == (Rung.COPY, (Rung.ASK, Rung.COPY))
        assert os.pread(desk.fds("web")[0], 4, 0) == b"kept"
        assert os.fstat(old).st_size == 0, "an access to what the process maps is SIGBUS"
        os.close(old)
        assert "halted" not in " ".join(desk.custody.names())


def test_what_shows_the_region_and_was_not_emptied_is_no_end(tmp_path: Path, victim: int) -> None:
    with desks(tmp_path, **process(reaching=((victim,),))) as desk, pytest.raises(GuestError) as kept:
        climb(desk, Rung.COPY, within=0.01)
    assert f"copy: its memfd is held by {victim}" in kept.value.why
    assert kept.value.remedy == "memconsole revoke g1 --at-most kill"


def test_a_region_whose_memory_is_lost_is_not_copied(tmp_path: Path) -> None:
    facts = process(lost=LOST, reaching=KEEPS)
    with desks(tmp_path, **facts) as desk, pytest.raises(GuestError, match="the memory of region web is lost"):
        climb(desk, Rung.COPY)


def test_without_fresh_frames_nothing_is_copied(tmp_path: Path) -> None:
    with desks(tmp_path, **process(reaching=KEEPS, regions=(region(), region("promised", 1 << 40)))) as desk:
        os.pwrite(desk.fds("web")[0], b"x" * M, 0)
        with pytest.raises(GuestError, match="1M of fresh frames are needed, 0 available"):
            climb(desk, Rung.COPY)


# --- kill ---------------------------------------------------------------------------------------------------------


def test_a_guest_that_keeps_it_is_killed_and_is_no_guest_any_more(tmp_path: Path) -> None:
    facts = canary(live=(Live("db", GuestKind.CANARY, unmaps=False),), reaching=((4000,), (4000,), ()), lost=LOST)
    with desks(tmp_path, **facts) as desk:
        victim = live(desk)
        report, ladder = climb(desk, within=LONG_S)
        assert (report.rung, report.outcome) == (Rung.KILL, RevokeOutcome.CUT)
        assert report.note.startswith("killed 4000; ask: ")
        assert victim.did[-1] == "kill"
        change = ladder.change()
        assert (change.without_guests, change.without_grants) == (("db",), ("g1",))
        assert desk.live_guest("db") is None


def test_a_process_that_got_the_descriptor_is_killed(tmp_path: Path, victim: int) -> None:
    with desks(tmp_path, **process(live=(), lost=LOST, reaching=((victim,), (victim,), ()))) as desk:
        report, ladder = climb(desk, within=LONG_S)
        assert f"killed {victim}" in report.note
        assert "pins are not ruled out" in report.note
        assert ladder.change().without_guests == (), "db is a guest still"
        assert os.waitpid(victim, 0)[1] == 9


def test_the_first_process_is_never_killed(tmp_path: Path) -> None:
    with (
        desks(tmp_path, **canary(lost=LOST, reaching=((1,),))) as desk,
        pytest.raises(GuestError) as kept,
    ):
        climb(desk, within=0.01)
    assert kept.value.what == "process 1 reaches it"


def test_who_may_keep_a_descriptor_out_of_sight_is_no_end(tmp_path: Path) -> None:
    hidden = pytest.raises(GuestError, match="thread's own table of 4711")
    with desks(tmp_path, **process(keeping=(4711,), lost=LOST)) as desk, hidden:
        climb(desk, Rung.ASK)


def test_the_guest_that_had_it_is_killed_last_where_it_may_keep_it_out_of_sight(tmp_path: Path) -> None:
    with desks(tmp_path, **process(keeping=(4711,), lost=LOST)) as desk:
        victim = live(desk)
        with pytest.raises(GuestError) as kept:
            climb(desk)
        assert victim.did == ["unmap g1", "kill"]
        assert "see /proc/PID/stack" in kept.value.remedy


def test_a_guest_that_ended_is_not_killed_again(tmp_path: Path) -> None:
    with desks(tmp_path, **process(keeping=(4711,), lost=LOST, live=(Live("db", says=GuestState.GONE),))) as desk:
        ended = live(desk)
        with pytest.raises(GuestError):
            climb(desk)
        assert "kill" not in ended.did


def test_a_process_that_ended_meanwhile_is_gone(tmp_path: Path) -> None:
    gone = 2**22 + 1
    with desks(tmp_path, **canary(live=(), lost=LOST, reaching=((gone,), (gone,), ()))) as desk:
        report, _ = climb(desk, within=LONG_S)
        assert report.rung is Rung.KILL
