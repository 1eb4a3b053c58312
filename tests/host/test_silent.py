"""One process may not hang or deceive another: guests, keepers and mount servers that are stopped."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import shutil
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import M, controls, guest, raised, runtime_dir
from support.guests import AgentProcess
from support.mounted import places
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.backend import looking, steps, upkeep
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.custody.respawn import RespawningKeeper
from memconsole.backend.embedded import embedded
from memconsole.backend.guests.commandline import BINARY
from memconsole.backend.handoff import facts
from memconsole.backend.peers.asked import PATIENCE_S
from memconsole.model import Finding, GuestState, RevokeOutcome, Snapshot


@contextlib.contextmanager
def stopped(*pids: int | None) -> Iterator[None]:
    """Processes that a signal has stopped."""
    assert None not in pids
    for pid in pids:
        os.kill(pid or 0, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid or 0, signal.SIGCONT)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hangs is not waited for that long: not how long is tested, but that nobody waits for each of them."""
    for module in (looking, facts):
        monkeypatch.setattr(module, "PATIENCE_S", PATIENCE_S / 4)


def found(snapshot: Snapshot, id: str) -> list[Finding]:
    return [finding for finding in snapshot.findings if finding.id == id]


def shown(control: Control, *silent: str, findings: int, of: tuple[str, ...] = ()) -> Snapshot:
    """The first Snapshot in which these guests are silent and ``of`` run, with so many findings."""
    seen: list[Snapshot] = []

    def is_so() -> bool:
        seen[:] = [control.snapshot()]
        states = {each.name: each.state for each in seen[0].guests}
        return (
            {name for name, state in states.items() if state is GuestState.SILENT} == {*silent}
            and all(states[name] is GuestState.RUNNING for name in of)
            and len(raised(seen[0])) == findings
        )

    until(is_so, f"{silent} are silent, and {of} run")
    return seen[0]


def askers() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("memconsole-guest-"))


def test_guests_that_are_stopped_are_silent_and_the_others_are_seen() -> None:
    with controls() as control:
        names = [f"c{number}" for number in range(4)]
        for name in names:
            control.apply(do.GuestStart(name, memory=4 * M))
        before = shown(control, findings=0, of=tuple(names))
        hung = [guest(before, name).pid for name in names[:3]]
        with stopped(*hung):
            for _ in range(10):
                taken = shown(control, *names[:3], findings=3, of=("c3",))
            assert askers() == [f"memconsole-guest-{name}" for name in names]
            for name, pid in zip(names[:3], hung, strict=True):
                now, last = guest(taken, name), guest(before, name)
                assert (now.state, now.agent) == (GuestState.SILENT, False)
                assert now.answered_ns is not None
                assert before.taken_ns - LONG_S * 10**9 < now.answered_ns < taken.taken_ns
                assert last.progress is not None
                assert now.progress is not None
                assert now.progress.beats >= last.progress.beats
                finding = next(each for each in found(taken, "guest-silent") if each.subject == name)
                assert "its last answer is" in finding.observed
                assert "a signal or a tracer has stopped its process" in finding.evidence
                assert f"kill -CONT {pid}" in finding.remedy
                assert "stop " not in finding.remedy
            plan = control.plan(do.HandoffRehearse())
            silent = next(each for each in plan.conditions if each.id == "guest-silent")
            assert not silent.ok
            assert all(name in silent.observed for name in names[:3])
            assert "c3" not in silent.observed
        shown(control, findings=0, of=tuple(names))
        for name in names:
            control.apply(do.GuestStop(name))
        until(lambda: not askers(), "nobody asks guests that are no more")


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_a_qemu_that_hangs_is_silent_and_can_still_be_stopped() -> None:
    with controls() as control:
        for name in ("vm", "other"):
            control.apply(do.GuestStart(name, vmm="qemu", memory=32 * M))
        with stopped(guest(control.snapshot(), "vm").pid):
            shown(control, "vm", findings=1, of=("other",))
        until(lambda: guest(control.snapshot(), "vm").state is GuestState.RUNNING, "it answers again")
        with stopped(pid := guest(control.snapshot(), "vm").pid):
            until(lambda: bool(found(control.snapshot(), "guest-silent")), "it is silent")
            control._desk.remove_guest("vm")  # as an action lets it go, in the middle of a question
            until(lambda: askers() == ["memconsole-guest-other"], "nobody waits for it any more")
        os.kill(pid or 0, signal.SIGKILL)


def test_a_stopped_keeper_is_a_finding_and_the_rest_of_the_snapshot_is_there() -> None:
    with runtime_dir() as directory:
        custody = RespawningKeeper(directory)
        keeper = custody.pid
        with contextlib.closing(Control(directory, custody)) as control:
            control.apply(do.Reserve("web", M))
            control.apply(do.GuestStart("c", memory=4 * M))
            shown(control, findings=0, of=("c",))
            with stopped(keeper):
                until(lambda: bool(found(control.snapshot(), "custody-silent")), "the keeper is silent")
                taken = control.snapshot()
                assert [finding.id for finding in raised(taken)] == ["custody-silent"]
                assert f"pid {keeper}" in found(taken, "custody-silent")[0].observed
                assert guest(taken, "c").state is GuestState.RUNNING
                assert {region.name for region in taken.regions if region.seen is not None} == {"web", "c"}
            until(lambda: not raised(control.snapshot()), "the keeper answers again")
            assert custody.pid == keeper
            control.apply(do.GuestStop("c"))
        with contextlib.closing(KeeperCustody(directory / "keeper")) as last:
            last.end(holding=True)


# --- the mount ----------------------------------------------------------------------------------------------------


def test_a_stopped_server_of_a_mount_is_a_finding_and_the_rest_of_the_snapshot_is_there() -> None:
    with places() as place:
        server = place.server()
        with stopped(server):
            until(lambda: bool(found(place.shown(), "mount-silent")), "the server is silent", 60.0)
            taken = place.shown()
            assert f"pid {server}" in found(taken, "mount-silent")[0].observed
            assert taken.host.name
        until(lambda: not found(place.shown(), "mount-silent"), "the server answers again", 60.0)
        assert place.server() == server


# --- looking and acting -------------------------------------------------------------------------------------------


def test_looking_while_a_region_is_freed_says_nothing_of_lost_memory() -> None:
    with controls() as control:
        for _ in range(3):
            control.apply(do.Reserve("web", 256 * M, prefault=True))
            seen: list[Snapshot] = []
            acts = threading.Thread(target=lambda: control.apply(do.Release("web")))
            acts.start()
            while acts.is_alive():
                seen.append(control.snapshot())
            acts.join()
            assert {finding.id for snapshot in seen for finding in snapshot.findings} == set()


def test_quarantine_is_not_checked_in_the_middle_of_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "EVERY_S", 3600.0)
    size = 256 * M
    with controls() as control, AgentProcess(control.runtime_dir / "agents") as process, contextlib.ExitStack() as pins:
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.Reserve("pool", size, prefault=True))
        grant = control.apply(do.Map("pool", "db")).subject
        process.do(f"wait {grant}")
        _pin(control._desk.fds("pool")[0], pins)
        outcome: list[RevokeOutcome] = []

        def revoke() -> None:
            report = control.apply(do.Revoke(grant)).revoke
            assert report is not None
            outcome.append(report.outcome)

        stands: queue.SimpleQueue[str] = queue.SimpleQueue()
        goes = threading.Semaphore(0)

        def stand(name: str) -> None:
            stands.put(name)
            assert goes.acquire(timeout=LONG_S)

        monkeypatch.setattr(steps, "point", stand)

        def act() -> None:
            revoke()
            stands.put("")

        acts = threading.Thread(target=act)
        acts.start()
        points = []
        while point := stands.get(timeout=LONG_S):
            points.append(point)
            upkeep_of(control).recheck()
            goes.release()
        acts.join()
        assert len(points) > 2
        assert outcome == [RevokeOutcome.QUARANTINED]
        kinds = [event.kind for event in control.snapshot().events]
        assert "unpinned" not in kinds
        upkeep_of(control).recheck()
        assert control.snapshot().quarantine
        pins.close()

        def let_go() -> bool:
            upkeep_of(control).recheck()
            return not control.snapshot().quarantine

        until(let_go, "the frames are let go")


def upkeep_of(control: Control) -> upkeep.Upkeep:
    """What the control process does of itself."""
    assert control._upkeep is not None
    return control._upkeep


def _pin(fd: int, pins: contextlib.ExitStack) -> None:
    """Have a pipe hold the first page of a file."""
    reading, writing = os.pipe()
    for end in (reading, writing):
        pins.callback(os.close, end)
    os.pwrite(fd, b"secret", 0)
    with mmap.mmap(fd, mmap.PAGESIZE) as mapped:
        page = ctypes.c_char.from_buffer(mapped)
        vector = struct.pack("QQ", ctypes.addressof(page), mmap.PAGESIZE)
        assert ctypes.CDLL(None).vmsplice(writing, vector, ctypes.c_size_t(1), 0) == mmap.PAGESIZE
        del page


def test_what_looks_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "EVERY_S", 3600.0)
    with contextlib.closing(embedded(tmp_path / "run", record_s=3600.0)) as control:
        first, *_ = (control.snapshot() for _ in range(3))
        assert control.history() == []
        upkeep_of(control).record_history()
        (recorded,) = control.history()
        assert recorded >= first.taken_ns
