"""Revokes held against a process that keeps every way into its memory it can find, and against its pins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hostile
from support.controls import controls, region
from support.hostile import LATER, PINS, SECRET, Hostile, accomplices, no_fresh_files
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.kernel import census
from memconsole.backend.observe import reach
from memconsole.backend.peers.handle import stat
from memconsole.errors import GuestError
from memconsole.extents import digest_fd
from memconsole.model import RevokeOutcome, RevokeReport, Rung

M = 1 << 20
PAGE = 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("page flags and other users' processes are for root")
    return hostile.build(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


def fill(control: Control, word: bytes, size: int = 2 * M) -> None:
    """Write a word at the begin of every page of region ``loot``."""
    (fd,) = control._desk.fds("loot")
    for at in range(0, size, PAGE):
        os.pwrite(fd, word + at.to_bytes(8, "little"), at)


def contents(control: Control) -> str:
    (fd,) = control._desk.fds("loot")
    return digest_fd(fd)


def let_in(control: Control, guest: Hostile, length: int | None = None) -> str:
    """Grant it the region full of secrets, hold it to having every way, and return the digest of the contents."""
    control.apply(do.Reserve("loot", 4 * M))
    fill(control, SECRET)
    control.apply(do.GuestAttach("hostile", guest.pid))
    until(lambda: control._desk.hub.connected("hostile"), "its agent is there")
    control.apply(do.Map("loot", "hostile", length=length))
    guest.ready()
    before = guest.tries()
    if before["ring"] == "no ring":
        pytest.skip("io_uring is not allowed here (kernel.io_uring_disabled)")
    assert set(before.values()) == {SECRET.decode()}, before
    return contents(control)


def revoke(control: Control, at_most: Rung = Rung.KILL) -> RevokeReport:
    report = control.apply(do.Revoke("g1", within=1, at_most=at_most)).revoke
    assert report is not None
    return report


def shut_out(control: Control, guest: Hostile, kept: str, *, pinned: bool) -> None:
    """Hold every way to leading nowhere: not to the contents, not to what the owner writes next, and not into it."""
    after = guest.tries()
    leads = {way for way, what in after.items() if what == SECRET.decode()}
    assert leads == (PINS if pinned else set()), after
    assert contents(control) == kept
    fill(control, LATER)
    guest.scrawls()
    later = contents(control)
    again = guest.tries()
    assert LATER.decode() not in again.values(), again
    assert {way for way, what in again.items() if what == SECRET.decode()} == leads, again
    fill(control, LATER)
    assert contents(control) == later


@pytest.mark.parametrize("pinned", [True, False])
def test_who_ignores_the_asking_is_cut_off_by_moving_the_contents(
    control: Control, program: Path, *, pinned: bool
) -> None:
    with hostile.running(program, control.runtime_dir / "agents", "ignore") as guest:
        kept = let_in(control, guest)
        old = region(control.snapshot(), "loot").segments[0].inode
        if not pinned:
            guest.drops_pins()
        report = revoke(control)
        assert (report.rung, report.tried) == (Rung.COPY, (Rung.ASK, Rung.COPY))
        assert report.outcome is (RevokeOutcome.QUARANTINED if pinned else RevokeOutcome.PROVED), report
        assert guest.alive()
        assert region(control.snapshot(), "loot").segments[0].inode != old
        shut_out(control, guest, kept, pinned=pinned)


def test_who_says_it_unmapped_and_keeps_pins_reaches_nothing_but_them(control: Control, program: Path) -> None:
    with hostile.running(program, control.runtime_dir / "agents", "lie") as guest:
        kept = let_in(control, guest)
        report = revoke(control, Rung.ASK)
        assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.QUARANTINED), report
        shut_out(control, guest, kept, pinned=True)


def test_pinned_frames_are_nobodys_until_the_pin_drops(control: Control, program: Path) -> None:
    with hostile.running(program, control.runtime_dir / "agents", "ignore") as guest:
        let_in(control, guest)
        revoke(control)
        (kept,) = control.snapshot().quarantine
        assert (kept.region, kept.guest, kept.size) == ("loot", "hostile", 2 * PAGE)
        (finding,) = [finding for finding in control.snapshot().findings if finding.id == "frames-quarantined"]
        assert finding.subject == "loot"
        control.apply(do.Release("loot"))
        assert control.snapshot().quarantine == (kept,)
        guest.drops_pins()
        until(lambda: control.snapshot().quarantine == (), "the kernel has its frames back")
        assert [name for name in control._desk.custody.names() if name.startswith("quarantine")] == []


def test_accomplices_reach_nothing_after_the_contents_moved(control: Control, program: Path) -> None:
    """One has the fd it was sent, mapped; in the socket of the other it still waits."""
    with (
        accomplices() as (taker, waiter),
        hostile.running(program, control.runtime_dir / "agents", "ignore", taker, waiter) as guest,
    ):
        kept = let_in(control, guest)
        assert [taker.do("take"), taker.do("map")] == [SECRET.decode()] * 2
        report = revoke(control)
        assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.QUARANTINED), report
        shut_out(control, guest, kept, pinned=True)
        assert waiter.do("take") == "nothing"
        assert waiter.do("map").startswith("refused")
        assert taker.do("look") == ""
        until(lambda: taker.ended() == -signal.SIGBUS, "there is nothing behind what it mapped")


@pytest.mark.parametrize("manners", ["ignore", "lie"])
def test_a_descriptor_that_waits_in_a_socket_is_not_forgotten_where_the_contents_cannot_move(
    control: Control, program: Path, manners: str
) -> None:
    """Whoever shows is killed; that is not the end while somebody who does not may have the file."""
    with (
        accomplices() as (taker, waiter),
        hostile.running(program, control.runtime_dir / "agents", manners, taker, waiter) as guest,
    ):
        kept = let_in(control, guest, length=2 * M)
        assert [taker.do("take"), taker.do("map")] == [SECRET.decode()] * 2
        with no_fresh_files():
            with pytest.raises(GuestError, match=f"of {waiter.pid}") as error:
                revoke(control)
            assert error.value.code == "StillMapped"
            until(lambda: not guest.alive() and taker.ended() == -signal.SIGKILL, "who showed is dead")
            assert waiter.ended() is None
            assert [each.id for each in control.snapshot().grants] == ["g1"], "nothing is said to be over"
            waiter.end()
            report = revoke(control)
        assert report.outcome is RevokeOutcome.CUT, report
        assert control.snapshot().grants == ()
        assert contents(control) == kept


THREADS = """
import ctypes, os, sys, threading, time
way, libc = sys.argv[1], ctypes.CDLL(None)
ours = os.memfd_create("memconsole:loot:0" if way != "stranger" else "else")
os.ftruncate(ours, 4096)
ready = threading.Event()
def keep():
    if way != "ghost":
        libc.unshare(0x400)
    ready.set()
    time.sleep(1000)
threading.Thread(target=keep).start()
ready.wait()
if way != "shown":
    os.close(ours)
print("ready", flush=True)
if way == "ghost":
    libc.dup3(os.memfd_create("memconsole:loot:0"), 9, 0)
    libc.syscall(60, 0)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("way", "keeps", "holds"),
    [("own", True, False), ("ghost", False, True), ("shown", False, True), ("stranger", False, False)],
)
def test_a_thread_that_keeps_a_descriptor_of_its_own_is_seen(
    program: Path, way: str, *, keeps: bool, holds: bool
) -> None:
    """In a table of its own (CLONE_FILES); a process whose first thread has ended holds it as any other does."""
    with subprocess.Popen([sys.executable, "-c", THREADS, way], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if way == "ghost":
                until(lambda: stat(process.pid)[0] == "Z", "its first thread has ended")
            assert (process.pid in reach.possible_keepers(frozenset())) == keeps
            links = census.take().processes[process.pid].fds.values()
            assert any(link.startswith("/memfd:memconsole:loot") for link in links) == holds
        finally:
            process.kill()


def test_where_no_fresh_frames_can_be_had_it_takes_killing(control: Control, program: Path) -> None:
    with hostile.running(program, control.runtime_dir / "agents", "ignore") as guest:
        kept = let_in(control, guest, length=2 * M)
        with no_fresh_files():
            report = revoke(control)
        assert (report.rung, report.outcome) == (Rung.KILL, RevokeOutcome.CUT), report
        assert report.tried == (Rung.ASK, Rung.COPY, Rung.KILL)
        assert "no fresh memory" in report.note
        assert str(guest.pid) in report.note
        until(lambda: not guest.alive(), "it is dead")
        assert contents(control) == kept
