"""Processes as guests of a control process, on real memory: grants, revokes, what they fork and keep."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import M, controls, goes_on, grant, is_gone, ours
from support.guests import AgentProcess, fd_links
from support.open_fds import nothing_stays_open
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.stores import files
from memconsole.errors import GuestError, MemconsoleError, Refused
from memconsole.model import Access, GrantState, RegionState, RevokeOutcome, Rung, Severity


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


@pytest.fixture
def database(control: Control) -> Iterator[AgentProcess]:
    """A process with an agent, attached as ``db``."""
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.GuestAttach("db", process.pid))
        yield process


def test_a_process_maps_what_it_is_granted(control: Control, database: AgentProcess) -> None:
    control.apply(do.Reserve("cache", 4 * M))
    control.apply(do.Map("cache", "db", length=2 * M))
    assert database.do("wait g1") == "g1"
    assert database.do("write g1 hello") == "done"
    until(lambda: grant(control.snapshot(), "g1").state is GrantState.MAPPED, "the ledger knows")
    (mapping,) = grant(control.snapshot(), "g1").seen
    assert mapping.end - mapping.start == 2 * M
    control.apply(do.Revoke("g1", at_most=Rung.ASK))
    assert database.do("grants") == "none"
    control.apply(do.Map("cache", "db", length=2 * M, access=Access.RO))
    assert database.do("wait g2") == "g2"
    assert database.do("read g2 5") == "hello"
    control.apply(do.GuestStop("db"))
    assert database.do("grants") == "none"
    assert ours(control.snapshot()) == []
    control.apply(do.Release("cache"))


def test_a_grant_waits_for_an_agent_that_comes_later(control: Control) -> None:
    control.apply(do.Reserve("cache", M))
    with subprocess.Popen(
        [sys.executable, "-c", LATE, str(control.runtime_dir / "agents")], stdin=subprocess.PIPE
    ) as late:
        try:
            control.apply(do.GuestAttach("late", late.pid))
            control.apply(do.Map("cache", "late"))
            assert grant(control.snapshot(), "g1").state is GrantState.OFFERED
            assert control.snapshot().findings == ()
            assert late.stdin is not None
            late.stdin.write(b"\n")
            late.stdin.flush()
            until(lambda: grant(control.snapshot(), "g1").state is GrantState.MAPPED, "it is mapped")
            assert control.events(0)[-1].kind == "mapped"
        finally:
            late.kill()


LATE = """
import sys
from memconsole.agent import Agent
sys.stdin.readline()
with Agent(sys.argv[1]) as agent:
    agent.wait("g1", 300)
    sys.stdin.read()
"""


def test_an_offer_that_is_revoked_before_it_was_taken_is_never_taken(control: Control) -> None:
    control.apply(do.Reserve("cache", M))
    with AgentProcess(Path("/nowhere")) as sleeper:
        control.apply(do.GuestAttach("late", sleeper.pid))
        control.apply(do.Map("cache", "late"))
        report = control.apply(do.Revoke("g1", at_most=Rung.ASK)).revoke
        assert report is not None
        assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.PROVED)
        control.apply(do.Release("cache"))


FORKER = """
import os, sys, time
from memconsole.agent import Agent
agent = Agent(sys.argv[1])
grant = agent.wait("g1", 300)
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
sys.stdin.read()
"""


def test_a_child_that_kept_the_mapping_is_found_and_cut_off(control: Control) -> None:
    control.apply(do.Reserve("cache", M))
    arguments = [sys.executable, "-W", "ignore", "-c", FORKER, str(control.runtime_dir / "agents")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as forker:
        child = 0
        try:
            control.apply(do.GuestAttach("forker", forker.pid))
            control.apply(do.Map("cache", "forker"))
            assert forker.stdout is not None
            child = int(forker.stdout.readline())
            cache = next(region for region in control.snapshot().regions if region.name == "cache").seen
            assert cache is not None
            assert child in cache.mappers
            assert control.snapshot().findings == ()  # what a guest forks is the guest too
            with pytest.raises(GuestError, match=str(child)) as kept:
                control.apply(do.Revoke("g1", within=0.5, at_most=Rung.ASK))
            assert kept.value.code == "StillMapped"
            report = control.apply(do.Revoke("g1")).revoke
            assert report is not None
            assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED)
            assert str(child) in report.note
            assert forker.poll() is None
            os.kill(child, 0)
            assert ours(control.snapshot()) == ["forker"]
            assert control.snapshot().findings == ()
        finally:
            forker.kill()
            with contextlib.suppress(ProcessLookupError):
                if child:
                    os.kill(child, signal.SIGKILL)


MAPPER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 4096)
os.close(fd)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def test_a_process_that_works_for_a_guest_is_a_finding_until_it_is_named(control: Control) -> None:
    control.apply(do.Reserve("cache", M))
    with AgentProcess(control.runtime_dir / "agents") as guest:
        control.apply(do.GuestAttach("db", guest.pid))
        control.apply(do.Map("cache", "db"))
        guest.do("wait g1")
        (segment,) = control.snapshot().regions[0].segments
        link = next(
            path
            for path in fd_links(os.getpid())
            if ((status := path.stat()).st_dev, status.st_ino) == (segment.device, segment.inode)
        )
        arguments = [sys.executable, "-c", MAPPER, f"/proc/{os.getpid()}/fd/{link.name}"]
        with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as backend:
            assert backend.stdout is not None
            assert backend.stdin is not None
            backend.stdout.readline()  # it has the memory, as QEMU hands it to a vhost-user backend
            (stray,) = control.snapshot().findings
            assert (stray.id, stray.severity, stray.subject) == ("mapping-unknown", Severity.ERROR, "cache")
            assert f"guest helper GUEST --pid {backend.pid}" in stray.remedy
            control.apply(do.GuestHelper("db", backend.pid))
            shown = control.snapshot()
            assert shown.findings == ()
            assert [each.pid for each in shown.guests[0].helpers] == [backend.pid]
            with pytest.raises(GuestError, match=str(backend.pid)):
                control.apply(do.Revoke("g1", within=0.5, at_most=Rung.ASK))
            backend.stdin.close()
            backend.wait(30)
        control.apply(do.Revoke("g1"))


def test_a_process_that_keeps_the_fd_reaches_the_memory_still(control: Control) -> None:
    """Whoever holds the memfd can map it again: a revoke does not end while somebody does."""
    control.apply(do.Reserve("cache", M))
    with AgentProcess(control.runtime_dir / "agents") as thief:
        control.apply(do.GuestAttach("thief", thief.pid))
        control.apply(do.Map("cache", "thief"))
        thief.do("wait g1")
        thief.do("hold g1")
        with pytest.raises(GuestError) as kept:
            control.apply(do.Revoke("g1", within=0.5, at_most=Rung.ASK))
        assert kept.value.code == "StillMapped"
        thief.do("let-go")
        control.apply(do.Revoke("g1", within=5, at_most=Rung.ASK))


def test_two_guests_never_get_the_same_frames(control: Control, database: AgentProcess) -> None:
    control.apply(do.Reserve("cache", 4 * M))
    control.apply(do.GuestStart("c1", memory=16 * M))
    control.apply(do.Map("cache", "db", length=2 * M))
    for access in Access:
        with pytest.raises(Refused) as refused:
            control.apply(do.Map("cache", "c1", gpa=1 << 30, access=access))
        assert refused.value.code == "Shared"
    assert database.do("wait g2") == "g2"
    control.apply(do.Revoke("g2", at_most=Rung.ASK))
    control.apply(do.Map("cache", "c1", offset=2 * M, gpa=1 << 30))
    assert control.snapshot().findings == ()
    goes_on(control, "c1")
    assert database.do("grants") == "none"


def test_a_grant_of_a_part_reaches_its_segment_and_says_so(control: Control, database: AgentProcess) -> None:
    """The other part is nobody's meanwhile, and a revoke does not end before it is given up as well."""
    control.apply(do.Reserve("cache", 4 * M))
    part, whole = do.Map("cache", "db", length=M), do.Map("cache", "db")
    said = "its file descriptor reaches all 4M of the segment"
    effects = [control.plan(action).effects[0].text for action in (part, whole)]
    assert [said in text for text in effects] == [True, False]
    control.apply(part)
    assert database.do("wait g1") == "g1"
    assert database.do(f"spread {2 * M}") == "done"
    with pytest.raises(GuestError, match=f"mapped by {database.pid}") as kept:
        control.apply(do.Revoke("g1", within=0.5, at_most=Rung.ASK))
    assert kept.value.code == "StillMapped"
    report = control.apply(do.Revoke("g1")).revoke
    assert report is not None
    assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED)
    (fd,) = control._desk.fds("cache")
    assert os.pread(fd, 6, 2 * M) == b"spread"
    os.pwrite(fd, b"others", 2 * M)
    assert database.do("look") == "", "what it kept leads nowhere"
    until(lambda: is_gone(control, "db"), "SIGBUS ended it")


def test_segments_of_a_region_are_granted_and_taken_back_each_for_itself(
    control: Control, database: AgentProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SEGMENT", 2 * M)
    control.apply(do.Reserve("large", 4 * M))
    control.apply(do.Map("large", "db", length=M))
    second = do.Map("large", "db", offset=M, length=M)
    assert [refusal.code for refusal in control.plan(second).refusals] == ["Shared"]
    control.apply(do.Map("large", "db", offset=2 * M))
    assert [database.do("wait g1"), database.do("wait g2")] == ["g1", "g2"]
    assert [database.do("write g2 kept"), database.do("hold g2")] == ["done", "done"]
    report = control.apply(do.Revoke("g1", at_most=Rung.ASK)).revoke
    assert report is not None
    assert report.outcome is RevokeOutcome.PROVED
    assert [database.do("grants"), database.do("read g2 4")] == ["g2", "kept"]
    with pytest.raises(GuestError) as kept:
        control.apply(do.Revoke("g2", within=0.5, at_most=Rung.ASK))
    assert kept.value.code == "StillMapped"
    control.apply(second)
    assert database.do("wait g3") == "g3"


def test_what_fails_in_the_middle_is_undone(control: Control, database: AgentProcess) -> None:
    """A step that fails: the guest cannot map what it is offered, and nothing is left of the grant."""
    control.apply(do.Reserve("cache", M))
    database.end()
    with pytest.raises(MemconsoleError):
        control.apply(do.Map("cache", "db"))
    assert control.snapshot().grants == ()
    assert control.snapshot().regions[0].state is RegionState.RESERVED


def test_actions_leave_no_fds_and_no_threads_behind(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=4 * M))

    def cycle(n: int) -> None:
        control.apply(do.Reserve("web", M))
        # Elsewhere each time: a canary holds memory to what stood at its gpa before.
        id = control.apply(do.Map("web", "c1", gpa=(1 << 30) + n * M)).subject
        with control.extents("region:web"), control.extents("guest:c1"):
            control.snapshot()
        control.apply(do.Revoke(id, at_most=Rung.ASK))
        control.apply(do.Release("web"))

    cycle(0)
    threads = threading.active_count()
    with nothing_stays_open():
        for n in range(1, 20):
            cycle(n)
    until(lambda: threading.active_count() <= threads, "nothing more runs")
    goes_on(control, "c1")
