"""The whole life of regions, guests and grants through a control process, on real memory and real guests."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import M, controls, goes_on, grant, guest, is_gone, ours, pages_of, region
from support.guests import AgentProcess, frames, mapping_of, open_fds, until

from memconsole import actions as do
from memconsole.backend.control import Control, embedded
from memconsole.backend.stores import memfd
from memconsole.errors import GuestError, MemconsoleError, NotFound, Refused
from memconsole.model import Access, GrantState, GuestKind, GuestState, RegionState, RevokeOutcome, Rung, Severity

QEMU = shutil.which("qemu-system-x86_64")


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


def read(pid: int, address: int, length: int) -> bytes:
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


# --- regions ------------------------------------------------------------------------------------------------------


def test_a_region_is_reserved_and_released(control: Control) -> None:
    outcome = control.apply(do.Reserve("web", 8 * M, prefault=True), peer="uid 7")
    assert (outcome.subject, [effect.id for effect in outcome.effects]) == ("web", ["create", "hold"])
    found = region(control.snapshot(), "web")
    assert found.state is RegionState.RESERVED
    assert found.seen is not None
    assert found.seen.resident == 8 * M
    assert "grow" in found.seen.seals
    control.apply(do.Release("web"))
    assert control.snapshot().regions == ()
    assert [(event.kind, event.peer) for event in control.events(0)] == [("reserve", "uid 7"), ("release", "")]


def test_a_release_zeroes_the_frames_and_says_how_fast(control: Control) -> None:
    """Shown by who still has the frames then: a page in a pipe, and a file descriptor that waits in a socket."""
    control.apply(do.Reserve("web", 8 * M))
    (fd,) = control._desk.fds("web")
    os.pwrite(fd, b"secret" * 1000, 0)
    os.pwrite(fd, b"secret", 4 * M)
    reading, writing = os.pipe()
    with mmap.mmap(fd, 8 * M) as memory:
        page = ctypes.c_char.from_buffer(memory)
        vector = struct.pack("QQ", ctypes.addressof(page), 4096)
        assert ctypes.CDLL(None).vmsplice(writing, vector, ctypes.c_size_t(1), 0) == 4096
        del page
    outcome = control.apply(do.Release("web"))
    assert [effect.id for effect in outcome.effects] == ["wipe", "free", "forget"]
    assert re.fullmatch(r"region web is released: 12K zeroed at [0-9.]+[KMGT]/s, freed in [0-9.]+[mun]?s", outcome.text)
    assert os.read(reading, 4096) == bytes(4096)
    os.close(reading)
    os.close(writing)
    control.apply(do.Reserve("web", 8 * M))
    assert control.apply(do.Release("web")).text.startswith("region web is released: it held nothing, freed in ")


def test_a_release_of_what_cannot_be_written_to_leaves_the_zeroing_to_the_kernel(control: Control) -> None:
    control.apply(do.Reserve("web", 8 * M))
    (fd,) = control._desk.fds("web")
    os.pwrite(fd, b"secret", 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert "zeroed by the kernel" in control.apply(do.Release("web")).text
    assert control.snapshot().regions == ()


def test_the_pfn_map_of_a_region_is_whole_and_feeds_the_snapshot(control: Control) -> None:
    control.apply(do.Reserve("web", 8 * M, prefault=True))
    with control.extents("region:web") as table, control.extents("region:web") as again:
        stats = table.stats()
        assert (stats.pages, stats.present) == (2048, 2048)
        assert table.digest() == again.digest()
    seen = region(control.snapshot(), "web").seen
    assert seen is not None
    assert seen.runs == stats.runs
    control.apply(do.Release("web"))
    with pytest.raises(NotFound, match="web"):
        control.extents("region:web")


def test_a_snapshot_is_taken_while_an_action_runs(control: Control) -> None:
    applying = threading.Thread(target=control.apply, args=[do.Reserve("big", 512 * M, prefault=True)])
    applying.start()
    taken = 0
    while applying.is_alive():
        control.snapshot()
        taken += 1
    applying.join()
    assert taken > 1
    assert region(control.snapshot(), "big").seen


# --- canaries -----------------------------------------------------------------------------------------------------


def test_a_canary_lives_in_its_region_and_ends(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=16 * M))
    found = guest(control.snapshot(), "c1")
    assert (found.kind, found.state, found.grants) == (GuestKind.CANARY, GuestState.RUNNING, ("g1",))
    goes_on(control, "c1")
    snapshot = control.snapshot()
    (mapping,) = grant(snapshot, "g1").seen
    assert (mapping.pid, mapping.offset, mapping.perms) == (found.pid, 0, "rw-s")
    assert snapshot.findings == ()
    mine = region(snapshot, "c1")
    assert mine.state is RegionState.MAPPED
    assert mine.seen is not None
    assert mine.seen.mappers == (found.pid,)
    assert pages_of(Path(f"/proc/{found.pid}/maps"), mine.segments[0].inode)
    control.apply(do.GuestPause("c1"))
    assert guest(control.snapshot(), "c1").state is GuestState.PAUSED
    control.apply(do.GuestResume("c1"))
    goes_on(control, "c1")
    control.apply(do.GuestStop("c1"))
    assert not Path(f"/proc/{found.pid}").exists()
    snapshot = control.snapshot()
    assert (ours(snapshot), snapshot.grants) == ([], ())
    assert region(snapshot, "c1").state is RegionState.RESERVED
    control.apply(do.Release("c1"))


def test_the_pfns_of_a_guest_are_those_the_kernel_shows(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=16 * M))
    goes_on(control, "c1")
    control.apply(do.GuestPause("c1"))
    snapshot = control.snapshot()
    pid = guest(snapshot, "c1").pid
    assert pid is not None
    start, length = mapping_of(pid, region(snapshot, "c1").segments[0].inode)
    independent = frames(pid, start, length // 4096)
    with control.extents("guest:c1") as table:
        ours = [0] * (length // 4096)
        for row in table:
            for page in range(row.count):
                ours[row.offset + page] = row.pfn + page
    assert any(ours)
    assert ours == independent


def test_a_second_region_is_mapped_and_revoked_by_asking(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=16 * M))
    control.apply(do.Reserve("more", 4 * M))
    outcome = control.apply(do.Map("more", "c1", gpa=1 << 30))
    assert outcome.subject == "g2"
    assert grant(control.snapshot(), "g2").state is GrantState.MAPPED
    revoked = control.apply(do.Revoke("g2", at_most=Rung.ASK)).revoke
    assert revoked is not None
    assert (revoked.rung, revoked.outcome, revoked.tried) == (Rung.ASK, RevokeOutcome.CUT, (Rung.ASK,))
    goes_on(control, "c1")
    inode = region(control.snapshot(), "more").segments[0].inode
    assert not pages_of(Path(f"/proc/{guest(control.snapshot(), 'c1').pid}/maps"), inode)
    control.apply(do.Release("more"))


def test_a_guest_that_does_not_answer_is_cut_off_and_its_memory_stays(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=16 * M))
    goes_on(control, "c1")
    snapshot = control.snapshot()
    pid = guest(snapshot, "c1").pid
    assert pid is not None
    start, _ = mapping_of(pid, region(snapshot, "c1").segments[0].inode)
    os.kill(pid, signal.SIGSTOP)
    before = read(pid, start, 16 * M)
    with pytest.raises(GuestError, match=f"mapped by {pid}") as refused:
        control.apply(do.Revoke("g1", within=0.3, at_most=Rung.ASK))
    assert refused.value.code == "StillMapped"
    assert guest(control.snapshot(), "c1").grants == ("g1",)
    report = control.apply(do.Revoke("g1", within=2)).revoke
    assert report is not None
    assert (report.rung, report.outcome, report.tried) == (Rung.COPY, RevokeOutcome.PROVED, (Rung.ASK, Rung.COPY))
    snapshot = control.snapshot()
    assert (ours(snapshot), snapshot.grants) == (["c1"], ())
    os.kill(pid, signal.SIGCONT)
    until(lambda: guest(control.snapshot(), "c1").state is not GuestState.RUNNING, "it has no memory to run in")
    control.apply(do.GuestStop("c1"))
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.GuestAttach("heir", process.pid))
        control.apply(do.Map("c1", "heir", access=Access.RO))
        process.do("wait g2")
        start, _ = mapping_of(process.pid, region(snapshot, "c1").segments[0].inode)
        assert read(process.pid, start, 16 * M) == before


def test_a_guest_that_dies_is_a_finding_until_it_is_stopped(control: Control) -> None:
    control.apply(do.GuestStart("c1", memory=16 * M))
    pid = guest(control.snapshot(), "c1").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: is_gone(control, "c1"), "the guest is seen to be gone")
    assert [(finding.id, finding.subject) for finding in control.snapshot().findings] == [("guest-gone", "c1")]
    with pytest.raises(Refused) as refused:
        control.apply(do.GuestPause("c1"))
    assert refused.value.code == "GuestGone"
    control.apply(do.GuestStop("c1"))
    assert control.snapshot().findings == ()
    control.apply(do.Release("c1"))


def test_closing_ends_guests_and_leaves_nothing(tmp_path: Path) -> None:
    control = embedded(tmp_path / "r")
    control.apply(do.GuestStart("c1", memory=16 * M))
    pid = guest(control.snapshot(), "c1").pid
    control.close()
    assert not Path(f"/proc/{pid}").exists()
    assert not (tmp_path / "r").exists()
    with pytest.raises(Refused):
        control.apply(do.Reserve("web", M))


# --- QEMU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")
def test_a_qemu_runs_on_a_region_with_the_pfns_the_kernel_shows(control: Control) -> None:
    control.apply(do.GuestStart("vm", vmm="qemu", memory=64 * M))
    snapshot = control.snapshot()
    found = guest(snapshot, "vm")
    assert (found.kind, found.state) == (GuestKind.QEMU, GuestState.RUNNING)
    assert snapshot.findings == ()
    assert found.pid is not None
    assert found.seen is not None
    assert [(block.region, block.gpa, block.size) for block in found.seen.ram] == [("vm", 0, 64 * M)]
    control.apply(do.GuestPause("vm"))
    start, length = mapping_of(found.pid, region(snapshot, "vm").segments[0].inode)
    with control.extents("guest:vm") as table:
        ours = {row.offset + page: row.pfn + page for row in table for page in range(row.count)}
    shown = {page: pfn for page, pfn in enumerate(frames(found.pid, start, length // 4096)) if pfn}
    assert ours == shown
    assert ours
    with pytest.raises(GuestError) as kept:
        control.apply(do.Revoke("g1", at_most=Rung.ASK))
    assert kept.value.code == "StillMapped"
    with pytest.raises(Refused) as refused:
        control.apply(do.Map("vm", "vm"))
    assert refused.value.code == "FixedRam"
    control.apply(do.GuestResume("vm"))
    control.apply(do.GuestStop("vm"))
    assert not Path(f"/proc/{found.pid}").exists()
    control.apply(do.Release("vm"))


@pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")
def test_a_qemu_that_cannot_start_leaves_nothing(control: Control) -> None:
    with pytest.raises(GuestError, match="nonsense"):
        control.apply(do.GuestStart("vm", vmm="qemu", memory=64 * M, args=("-nonsense",)))
    snapshot = control.snapshot()
    assert (snapshot.regions, ours(snapshot), snapshot.grants) == ((), [], ())
    assert not (control.runtime_dir / "vmm" / "vm").exists()
    assert [event.text[:6] for event in control.events(0)] == ["failed"]
    control.apply(do.Reserve("vm", M))


@pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")
def test_a_vm_of_somebody_else_is_seen_and_not_touched(control: Control) -> None:
    command = [str(QEMU), "-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-m", "64"]
    with subprocess.Popen(
        [*command, "-object", "memory-backend-memfd,id=ram,size=64M,share=on,prealloc=on"]
    ) as process:
        try:
            name = f"qemu-{process.pid}"
            until(lambda: name in {found.name for found in control.snapshot().guests}, "the VM is seen")
            until(lambda: guest(control.snapshot(), name).memory >= 64 * M, "its RAM is seen")
            assert guest(control.snapshot(), name).kind is GuestKind.FOREIGN
            with control.extents(f"guest:{name}") as table:
                assert table.stats().present > 0
            with pytest.raises(Refused) as refused:
                control.apply(do.GuestStop(name))
            assert refused.value.code == "Foreign"
        finally:
            process.kill()


# --- processes ----------------------------------------------------------------------------------------------------


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
    agent.wait("g1", 30)
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
grant = agent.wait("g1", 30)
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
            stray = next(finding for finding in control.snapshot().findings if finding.id == "mapping-unknown")
            assert (stray.severity, stray.subject) == (Severity.ERROR, "cache")
            assert str(child) in stray.what
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
    monkeypatch.setattr(memfd, "SEGMENT", 2 * M)
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
    fds, threads = len(open_fds()), threading.active_count()
    for n in range(1, 20):
        cycle(n)
    assert (len(open_fds()), threading.active_count()) == (fds, threads)
    goes_on(control, "c1")
