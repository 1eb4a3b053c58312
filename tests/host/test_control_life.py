"""The whole life of regions, guests and grants through a control process, on real memory and real guests."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import M, controls, goes_on, grant, guest, is_gone, ours, pages_of, region
from support.faultpoints import fault_points
from support.guests import AgentProcess, frames, mapping_of
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.errors import GuestError, NotFound, Refused
from memconsole.model import Access, GrantState, GuestKind, GuestState, RegionState, RevokeOutcome, Rung

QEMU = shutil.which("qemu-system-x86_64")


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


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
    assert "the kernel zeroes its frames" in control.apply(do.Release("web")).text
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


def test_a_snapshot_is_taken_while_an_action_runs(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every boundary of its steps the action stands still until one was taken."""
    stands, goes = threading.Semaphore(0), threading.Semaphore(0)
    points: list[str] = []

    def stand(name: str) -> None:
        points.append(name)
        stands.release()
        assert goes.acquire(timeout=LONG_S)

    monkeypatch.setattr(steps, "point", stand)
    applying = threading.Thread(target=control.apply, args=[do.Reserve("big", 16 * M, prefault=True)])
    expected = fault_points(control.plan(do.Reserve("big", 16 * M, prefault=True)))
    applying.start()
    for _ in expected:
        assert stands.acquire(timeout=LONG_S)
        assert control.snapshot().host.name
        goes.release()
    applying.join()
    assert points == list(expected)
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
    start, length = mapping_of(pid, region(snapshot, "c1").segments[0])
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
    start, _ = mapping_of(pid, region(snapshot, "c1").segments[0])
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
        start, _ = mapping_of(process.pid, region(snapshot, "c1").segments[0])
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
    start, length = mapping_of(found.pid, region(snapshot, "vm").segments[0])
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
