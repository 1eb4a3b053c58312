"""Lazy grants: pages put in place when they are first touched, counted, and served on by the next control process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from support import controls as world_of
from support import keepers
from support.controls import M, beats, controls, goes_on, grant, region, runtime_dir
from support.guests import AgentProcess, frames, mapping_of
from support.waiting import until
from support.worlds import worlds

from memconsole import actions as do
from memconsole import native
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.errors import GuestError
from memconsole.model import Access, Faults, GrantState, RevokeOutcome, Rung

PAGE = 4096


@pytest.fixture(autouse=True)
def may_serve() -> None:
    if os.geteuid() != 0:
        pytest.skip("faults of the kernel on a guest's behalf are root's to serve")


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


def faults(control: Control, id: str) -> Faults:
    found = grant(control.snapshot(), id).faults
    assert found is not None
    return found


def lent(control: Control, process: AgentProcess, size: int = 8 * M, *, lazy: bool = True) -> int:
    """A region with words in it, granted to a process; its fd."""
    control.apply(do.Reserve("cache", size))
    (fd,) = control._desk.fds("cache")
    os.pwrite(fd, b"stands", 0)
    control.apply(do.GuestAttach("db", process.pid))
    control.apply(do.Map("cache", "db", lazy=lazy))
    assert process.do("wait g1") == "g1"
    if lazy:
        until(lambda: control._desk.userfaults.has_uffd("g1"), "its faults are served")
    return fd


def counted(control: Control, *, minor: int = 0, missing: int = 0) -> Faults:
    """What ``g1`` counts, once it has counted so many: a guest goes on before its fault is counted."""
    until(lambda: faults(control, "g1").minor + faults(control, "g1").missing >= minor + missing, "it is counted")
    seen = faults(control, "g1")
    assert (seen.minor, seen.missing) == (minor, missing)
    return seen


def present(control: Control, pid: int, size: int = 8 * M) -> list[int]:
    """Which pages the process has in place: the independent reader."""
    address, _ = mapping_of(pid, region(control.snapshot(), "cache").segments[0])
    return [page for page, pfn in enumerate(frames(pid, address, size // PAGE)) if pfn]


def test_pages_come_when_they_are_touched_a_batch_at_a_time(control: Control) -> None:
    with AgentProcess(control.runtime_dir / "agents") as process:
        fd = lent(control, process)
        assert present(control, process.pid) == []
        assert faults(control, "g1") == Faults(served=True, batch=64 << 10)
        assert process.do("read g1 6") == "stands"
        assert present(control, process.pid) == [0]
        counted(control, minor=1)
        until(lambda: grant(control.snapshot(), "g1").state is GrantState.MAPPED, "the ledger knows")
        os.pwrite(fd, b"x" * (64 << 10), M)
        process.do("write g1 " + "y" * 3000)
        in_place = len(present(control, process.pid)) * PAGE
        until(lambda: faults(control, "g1").present == in_place, "all of them are counted")


def test_a_hole_is_filled_by_the_batch_and_the_counters_are_the_kernels(control: Control) -> None:
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.Reserve("cache", 8 * M))
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.Map("cache", "db", lazy=True))
        assert process.do("wait g1") == "g1"
        process.do("write g1 hello")
        assert present(control, process.pid) == list(range(16))
        seen = counted(control, missing=1)
        assert (seen.present, seen.refused) == (64 << 10, 0)
        assert seen.longest_ns >= seen.busy_ns > 0


def test_a_guest_waits_for_the_next_control_process_and_goes_on() -> None:
    with (
        runtime_dir() as directory,
        keepers.running(native.program("memconsole-keeper")) as keeper,
        AgentProcess(directory / "run" / "agents") as process,
    ):
        first = Control(directory / "run", KeeperCustody(keeper.path))
        try:
            lent(first, process)
        finally:
            first.close()
        process.process.stdin.write("read g1 6\n")  # type: ignore[union-attr]
        process.process.stdin.flush()  # type: ignore[union-attr]
        time.sleep(0.3)
        second = Control(directory / "run", KeeperCustody(keeper.path))
        try:
            assert process.process.stdout.readline().strip() == "stands"  # type: ignore[union-attr]
            assert counted(second, minor=1).served
            report = second.apply(do.Revoke("g1", at_most=Rung.ASK)).revoke
            assert report is not None
            assert report.outcome is RevokeOutcome.PROVED
            assert second._desk.custody.names() == ["ledger", "region:cache:0"]
        finally:
            second.close()


HANDOVER = ("map.uffd.before", "map.uffd.held", "map.uffd.after")
"""What a control process passes when a guest hands its uffd over."""


@pytest.mark.parametrize("point", HANDOVER)
def test_one_that_dies_when_a_process_hands_its_faults_over_is_followed_by_one_that_has_them(point: str) -> None:
    with worlds() as world, AgentProcess(world.runtime / "agents") as process:
        os.kill(process.pid, signal.SIGSTOP)
        with world.control() as control:
            control.apply(do.Reserve("cache", 8 * M))
            (fd,) = control._desk.fds("cache")
            os.pwrite(fd, b"stands", 0)
            control.apply(do.GuestAttach("db", process.pid))
            control.apply(do.Map("cache", "db", lazy=True))
            assert grant(control.snapshot(), "g1").state is GrantState.OFFERED
        world.dies_when(lambda: os.kill(process.pid, signal.SIGCONT), point)
        with world.control() as control:
            assert process.do("wait g1") == "g1"
            until(lambda: faults(control, "g1").served, "its faults are served")
            assert present(control, process.pid) == []
            assert process.do("read g1 6") == "stands"
            assert present(control, process.pid) == [0]
            counted(control, minor=1)
            assert process.do("write g1 onward") == "done"
            until(lambda: grant(control.snapshot(), "g1").state is GrantState.MAPPED, "the ledger knows")
            assert control.apply(do.Revoke("g1", at_most=Rung.ASK)).revoke is not None
            assert control._desk.custody.names() == ["ledger", "region:cache:0"]


@pytest.mark.parametrize("point", HANDOVER)
def test_one_that_dies_when_a_canary_hands_its_faults_over_leaves_it_running(point: str) -> None:
    """Nobody was told that it had the memory: it is taken back, and can be had again."""
    with worlds() as world:
        with world.control() as control:
            control.apply(do.GuestStart("c1", memory=4 * M))
            control.apply(do.Reserve("more", 4 * M))
            goes_on(control, "c1")
        world.dies(do.Map("more", "c1", gpa=1 << 30, lazy=True), point, "c1")
        with world.control() as control:
            until(lambda: control._desk.live_guest("c1").agent(), "the canary came back")  # type: ignore[union-attr]
            assert [found.id for found in control.snapshot().grants] == ["g1"]
            assert not [name for name in control._desk.custody.names() if name.startswith(("uffd:g2", "board:g2"))]
            goes_on(control, "c1")
            again = control.apply(do.Map("more", "c1", gpa=1 << 30, lazy=True)).subject
            until(lambda: faults(control, again).present == 4 * M, "the guest goes through its memory")
            goes_on(control, "c1")


def test_a_canary_runs_on_memory_that_comes_as_it_goes(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=4 * M))
    control.apply(do.Reserve("more", 16 * M))
    control.apply(do.Map("more", "c1", gpa=1 << 30, lazy=True))
    until(lambda: faults(control, "g2").missing, "the guest goes into its memory")
    before = faults(control, "g2")
    until(lambda: faults(control, "g2").present > before.present, "the guest goes through its memory")
    goes_on(control, "c1")
    control.apply(do.Revoke("g2", at_most=Rung.ASK))
    goes_on(control, "c1")
    assert beats(control, "c1")
    assert world_of.region(control.snapshot(), "more").grants == ()


def test_an_emptied_file_ends_the_waiting_with_sigbus(control: Control) -> None:
    """A fault on memory that was moved away is the kernel's to refuse: nobody is asked, and nobody waits."""
    with AgentProcess(control.runtime_dir / "agents") as process:
        lent(control, process)
        process.do("hold g1")
        report = control.apply(do.Revoke("g1", within=1)).revoke
        assert report is not None
        assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED), report
        assert process.do("read g1 6") == ""
        until(lambda: process.process.poll() is not None, "SIGBUS ended it")
        assert process.end() == -7


def test_a_guest_that_cannot_hand_its_faults_over_is_refused(control: Control) -> None:
    """A read-only view of Python's has no address that could be registered."""
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.Reserve("cache", M))
        control.apply(do.GuestAttach("db", process.pid))
        until(lambda: control._desk.hub.connected("db"), "its agent is there")
        with pytest.raises(GuestError) as refused:
            control.apply(do.Map("cache", "db", lazy=True, access=Access.RO))
        assert refused.value.code == "NotLazy"
        assert process.do("grants") == "none"
        assert control.snapshot().grants == ()
