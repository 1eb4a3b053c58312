"""A rehearsal on this machine: VMMs end and come back on the same memory, whatever dies or fails in the middle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.controls import goes_on, grant, guest, raised, runtime_dir
from support.faultpoints import fault_points
from support.firmware import STATUS, firmware
from support.open_fds import nothing_stays_open
from support.waiting import LONG_S, until

from memconsole.actions import (
    GuestPause,
    GuestResume,
    GuestStart,
    GuestStop,
    HandoffRehearse,
    HandoffRun,
    Map,
    Release,
    Reserve,
    Revoke,
)
from memconsole.backend import steps
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.guests.commandline import BINARY
from memconsole.backend.handoff import bootplan, manifest, save_restore
from memconsole.cli.handing import told
from memconsole.errors import MemconsoleError, Refused
from memconsole.model import Faults, GuestState, HandoffReport, HandoffState, Rung
from memconsole.native import program

M = 1 << 20
SIZES = {"one": 16 * M, "two": 8 * M}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads PFNs and rules guests: root")


@contextlib.contextmanager
def kept(directory: Path) -> Iterator[None]:
    """A keeper that ends with the test, and every process whose memory it kept."""
    KeeperCustody.start(directory).close()
    try:
        yield
    finally:
        with contextlib.closing(control(directory)) as found:
            for each in found.snapshot().guests:
                if each.kind != "foreign" and each.pid is not None and each.seen is not None:
                    os.kill(each.pid, signal.SIGKILL)
        with keeper(directory) as last:
            last.end(holding=True)


def keeper(directory: Path) -> contextlib.closing[KeeperCustody]:
    return contextlib.closing(KeeperCustody(directory / "keeper"))


def left(directory: Path) -> list[str]:
    """What of a handoff is still in custody."""
    with keeper(directory) as found:
        return [name for name in found.names() if name.startswith(("state:", "session:", "resume"))]


def held(directory: Path) -> int:
    with keeper(directory) as found:
        return found.status().held


@pytest.fixture
def place() -> Iterator[Path]:
    with runtime_dir() as directory, kept(directory):
        yield directory


def control(directory: Path) -> Control:
    return Control(directory, KeeperCustody(directory / "keeper"))


def begin(directory: Path) -> Control:
    found = control(directory)
    for name, size in SIZES.items():
        found.apply(GuestStart(name, memory=size))
        goes_on(found, name)
    return found


def pids(found: Control) -> dict[str, int | None]:
    return {each.name: each.pid for each in found.snapshot().guests if each.kind != "foreign"}


def refuse(*_: object, **__: object) -> None:
    """In the place of what is to fail."""
    raise MemconsoleError("it cannot be saved", "said the test")


def test_every_guest_is_another_process_on_the_same_memory(place: Path) -> None:
    with contextlib.closing(begin(place)) as found:
        before = pids(found)
        outcome = found.apply(HandoffRehearse())
        assert outcome.effects[0].id == "check"
        after = pids(found)
        assert all(after[name] not in {None, before[name]} for name in SIZES)
        for name in SIZES:
            goes_on(found, name)
        until(lambda: all(each.by == "guest" for each in report(found).guests), "the canaries tell their blackout")
        made = report(found)
        assert made.state is HandoffState.DONE
        assert all(each.back and each.blackout_ns for each in made.guests)
        assert {(each.name, each.same) for each in made.regions} == {(name, True) for name in SIZES}
        assert not [each for each in found.snapshot().findings if each.id.startswith("handoff")]
        ends = [phase.end_ns for phase in made.phases]
        assert None not in ends
        assert [phase.start_ns for phase in made.phases] == sorted(phase.start_ns for phase in made.phases)
        assert left(place) == []


def runs(control: Control, name: str) -> bool:
    return guest(control.snapshot(), name).state is GuestState.RUNNING


def report(found: Control) -> HandoffReport:
    made = found.snapshot().handoff
    assert made is not None
    return made


def test_contents_are_compared_before_a_guest_may_touch_them(place: Path) -> None:
    with contextlib.closing(begin(place)) as found:
        found.apply(GuestPause("two"))
        found.apply(HandoffRehearse(contents=True))
        assert {each.contents for each in report(found).regions} == {True}
        goes_on(found, "one")
        assert guest(found.snapshot(), "two").state is GuestState.PAUSED


def test_it_can_be_done_again_and_again_and_leaves_nothing(place: Path) -> None:
    with contextlib.closing(begin(place)) as found:
        found.apply(HandoffRehearse())
        for name in SIZES:
            goes_on(found, name)
        before = held(place)
        with nothing_stays_open():
            for _ in range(3):
                found.apply(HandoffRehearse())
            for name in SIZES:
                goes_on(found, name)
        assert held(place) == before


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_qemu_goes_along(place: Path) -> None:
    with contextlib.closing(begin(place)) as found:
        found.apply(GuestStart("vm", vmm="qemu", memory=32 * M))
        before = pids(found)
        for _ in range(2):
            found.apply(HandoffRehearse())
            assert guest(found.snapshot(), "vm").state is GuestState.RUNNING
        assert pids(found)["vm"] != before["vm"]
        assert all(each.back for each in report(found).guests)


def test_a_guest_that_cannot_be_saved_stops_it_and_all_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(begin(place)) as found:
        before = pids(found)

        monkeypatch.setattr("memconsole.backend.handoff.save_restore.save", refuse)
        with pytest.raises(MemconsoleError, match="it cannot be saved"):
            found.apply(HandoffRehearse())
        assert pids(found) == before
        assert report(found).state is HandoffState.FAILED
        assert "said the test" in report(found).why
        for name in SIZES:
            goes_on(found, name)


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_a_paused_guest_stays_paused_whether_it_fails_or_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(begin(place)) as found:
        found.apply(GuestStart("vm", vmm="qemu", memory=32 * M))
        before = pids(found)
        for name in ("one", "vm"):
            found.apply(GuestPause(name))
        for fails in (True, False):
            with monkeypatch.context() as patch:
                if fails:
                    patch.setattr(save_restore, "restart_of_live", refuse)
                with pytest.raises(MemconsoleError, match="said the test") if fails else contextlib.nullcontext():
                    found.apply(HandoffRehearse())
            assert (pids(found) == before) is fails
            states = {name: guest(found.snapshot(), name).state for name in before}
            assert states == {"one": GuestState.PAUSED, "two": GuestState.RUNNING, "vm": GuestState.PAUSED}
        found.apply(GuestResume("one"))
        for name in SIZES:
            goes_on(found, name)
        found.apply(GuestResume("vm"))


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_a_suspended_guest_stays_suspended_whatever_happens_and_counts_on_once_it_is_woken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(found: Control) -> tuple[int, int]:
        (fd,) = found.open_readonly("vm")
        try:
            return struct.unpack("<I8xI", os.pread(fd, 16, STATUS))
        finally:
            os.close(fd)

    def suspended(found: Control) -> bool:
        return guest(found.snapshot(), "vm").state is GuestState.SUSPENDED

    def is_as_it_was(found: Control) -> bool:
        return suspended(found) and counted(found) == (100_000, 0) and left(place) == []

    with contextlib.closing(control(place)) as found:
        found.apply(GuestStart("vm", vmm="qemu", memory=32 * M, args=firmware(place, 100_000)))
        until(partial(suspended, found), "it is suspended")
        with pytest.raises(Refused, match="is suspended"):
            found.apply(GuestPause("vm"))
        with monkeypatch.context() as patch:
            patch.setattr(save_restore, "restart_of_live", refuse)
            with pytest.raises(MemconsoleError, match="said the test"):
                found.apply(HandoffRehearse())
        assert is_as_it_was(found)
    for point in ("pause-vm.after", "save-vm.after", "manifest.after"):
        dies(place, REHEARSES, f"handoff-rehearse.{point}")
        with contextlib.closing(control(place)) as found:
            assert is_as_it_was(found), point
    with contextlib.closing(control(place)) as found:
        before = pids(found)
        found.apply(HandoffRehearse())
        assert pids(found) != before
        assert is_as_it_was(found)
        found.apply(GuestResume("vm"))
        until(lambda: counted(found) == (200_000, 1), "it counts on")
        until(partial(suspended, found), "it is suspended again")


def test_a_terminal_sees_the_phases_until_guests_stand_still(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, save = "", save_restore.save

    def seen() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "stop the guests" in said

    def save_then(*arguments: Any) -> Any:
        until(seen, "the phase is told")
        return save(*arguments)

    with contextlib.closing(begin(place)) as found:
        monkeypatch.setattr(save_restore, "save", save_then)
        with told(found):
            found.apply(HandoffRehearse())
        assert all(each.back for each in report(found).guests)
    lines = [line.split(" s  ")[1] for line in (said + capsys.readouterr().err).splitlines()]
    assert lines == ["check every condition", "stop the guests"]


def test_a_guest_that_did_not_come_back_is_kept_and_can_be_resumed_later(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(begin(place)) as found:
        revival, missing = save_restore.restart_of_live, place / "canary"

        def elsewhere(*arguments: Any, **named: Any) -> Any:
            start, say = revival(*arguments, **named)
            return (replace(start, words=(str(missing), *start.words[1:])) if start.guest == "two" else start), say

        monkeypatch.setattr(save_restore, "restart_of_live", elsewhere)
        found.apply(HandoffRehearse())
        goes_on(found, "one")
        shown = found.snapshot()
        assert guest(shown, "two").state is GuestState.GONE
        assert [each.subject for each in shown.findings if each.id == "handoff-guest-held"] == ["two"]
        assert left(place) == ["state:two"]
        with pytest.raises(MemconsoleError, match="did not come back"):
            found.apply(GuestResume("two"))
        missing.symlink_to(program("memconsole-canary"))
        found.apply(GuestResume("two"))
        goes_on(found, "two")
        goes_on(found, "one")
        assert left(place) == []


def test_what_a_newer_memconsole_wrote_is_kept_and_resumed_by_hand(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another that hands off; this one knows neither its boot plan nor its manifest, and loses nothing."""
    begin(place).close()
    written = manifest.write
    with monkeypatch.context() as newer, contextlib.closing(control(place)) as other:
        newer.setattr(bootplan, "VERSION", bootplan.VERSION + 1)
        newer.setattr(manifest, "write", lambda plan, whole: written(plan, replace(whole, version=99)))
        other.apply(HandoffRehearse())
        kept_ids = {"manifest-unknown", "handoff-plan-broken", "handoff-guest-held"}
        assert kept_ids <= {each.id for each in other.snapshot().findings}
    for name in SIZES:
        with contextlib.closing(control(place)) as found:
            waits = [each.subject for each in found.snapshot().findings if each.id == "handoff-guest-held"]
            assert name in waits, "the next one finds it waiting"
            assert guest(found.snapshot(), name).state is GuestState.GONE
            found.apply(GuestResume(name))
            goes_on(found, name)
            assert name not in [each.subject for each in found.snapshot().findings if each.id == "handoff-guest-held"]
    assert left(place) == []


def test_a_guest_that_waits_can_be_given_up(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(begin(place)) as found:
        with monkeypatch.context() as newer:
            newer.setattr(bootplan, "VERSION", bootplan.VERSION + 1)
            found.apply(HandoffRehearse())
        assert left(place) == ["state:one", "state:two"]
        found.apply(GuestStop("two"))
        found.apply(Release("two"))
        assert left(place) == ["state:one"]
        found.apply(GuestResume("one"))
        goes_on(found, "one")


def test_killed_while_it_resumes_one_by_hand_it_is_resumed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(begin(place)) as found:
        monkeypatch.setattr(bootplan, "VERSION", bootplan.VERSION + 1)
        found.apply(GuestStart("three", memory=M))
        found.apply(GuestStart("four", memory=M))
        found.apply(HandoffRehearse())
        monkeypatch.undo()
        points = fault_points(found.plan(GuestResume("one")))
    for name, point in zip([*SIZES, "three", "four"], points, strict=True):
        dies(place, f"control.apply(GuestResume({name!r}))", point)
        with contextlib.closing(control(place)) as after:
            until(partial(runs, after, name), f"{name} at {point}")
            goes_on(after, name)
            assert f"state:{name}" not in left(place)


def test_a_lazy_grant_is_an_ordinary_one_afterwards(place: Path) -> None:
    with contextlib.closing(begin(place)) as found:
        found.apply(Reserve("more", 8 * M))
        lazy = found.apply(Map("more", "one", gpa=1 << 30, lazy=True)).subject
        until(lambda: (grant(found.snapshot(), lazy).faults or Faults(served=False)).present > 0, "it faults")
        (told,) = [each for each in found.plan(HandoffRehearse()).conditions if each.id == "lazy-granted"]
        assert (told.ok, told.observed) == (False, f"lazy grants: {lazy} of one")
        found.apply(HandoffRehearse())
        goes_on(found, "one")
        after = grant(found.snapshot(), lazy)
        assert (after.lazy, after.faults) == (False, None)
        assert any(lazy in note for note in report(found).notes)
        with keeper(place) as custody:
            assert not [name for name in custody.names() if name.startswith(("uffd:", "board:"))]
        found.apply(Revoke(lazy, at_most=Rung.ASK))
        goes_on(found, "one")


def test_a_jump_is_refused_by_name_where_the_kernel_has_no_live_update(place: Path) -> None:
    if Path("/dev/liveupdate").exists():
        pytest.skip("this kernel has live update")
    with contextlib.closing(begin(place)) as found:
        codes = {each.code for each in found.plan(HandoffRun()).refusals}
        assert "LiveUpdate" in codes
        with pytest.raises(Refused) as refused:
            found.apply(HandoffRun())
        assert refused.value.code in codes
        for name in SIZES:
            goes_on(found, name)


ANOTHER = """
import sys
from pathlib import Path
from memconsole.actions import GuestResume, HandoffRehearse
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
directory = Path(sys.argv[1])
control = Control(directory, KeeperCustody(directory / "keeper"))
"""
REHEARSES = "control.apply(HandoffRehearse())"


def another(place: Path, does: str, fault: str) -> subprocess.CompletedProcess[str]:
    """Another control process over the same directory takes over, and does something, unless a fault ends it."""
    words = [sys.executable, "-c", f"{ANOTHER}{does}", str(place)]
    env = os.environ | {steps.FAULT_VARIABLE: fault}
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=LONG_S, check=False)


def dies(place: Path, does: str, fault: str) -> None:
    """It ends at the fault."""
    done = another(place, does, fault)
    assert done.returncode == -signal.SIGKILL, f"{fault}: {done.stderr}"


def all_are_back(place: Path) -> None:
    """Whoever takes over now finds everybody running, and nothing left of how they came there."""
    with contextlib.closing(control(place)) as after:
        assert report(after).state is HandoffState.DONE
        assert all(each.back for each in report(after).guests)
        for name in SIZES:
            goes_on(after, name)
        assert left(place) == []
        assert [each for each in raised(after.snapshot()) if each.severity != "info"] == []


def test_killed_at_every_point_every_guest_goes_on(place: Path) -> None:
    """The one that dies is another process; whoever comes after it finds every guest running, or starts it."""
    with contextlib.closing(begin(place)) as found:
        points = fault_points(found.plan(HandoffRehearse()))
    assert len(set(points)) == len(points) >= 16
    for point in points:
        dies(place, REHEARSES, point)
        with contextlib.closing(control(place)) as after:
            for name in SIZES:
                until(partial(runs, after, name), f"{name} at {point}")
                goes_on(after, name)
            assert left(place) == [], point
            assert not after.plan(HandoffRehearse()).refusals


def test_killed_at_every_point_of_taking_over_the_next_one_does_the_rest(place: Path, tmp_path: Path) -> None:
    """VMMs were started and nobody has taken over yet; who does dies at each of its points in turn."""
    with contextlib.closing(begin(place)):
        pass
    dies(place, REHEARSES, "handoff-rehearse.early.after")
    seen = tmp_path / "points"
    while (done := another(place, "control.close()", f"@{seen}")).returncode:
        assert done.returncode == -signal.SIGKILL, done.stderr
    points = seen.read_text().splitlines()
    assert {"adopt.begun", "adopt.read", "adopt.landed", "adopt.compared", "adopt.reported", "adopt.done"} < set(points)
    all_are_back(place)


def test_killed_at_every_point_of_starting_them_guests_go_on_once(place: Path, tmp_path: Path) -> None:
    """VMMs have ended; memconsole-resume dies at each of its points in turn, and the next start of it does the rest."""
    with contextlib.closing(begin(place)):
        pass
    dies(place, REHEARSES, "handoff-rehearse.end.after")
    seen = tmp_path / "points"
    env = os.environ | {steps.FAULT_VARIABLE: f"@{seen}"}
    words = [program("memconsole-resume"), "--rehearse", "--runtime", str(place)]
    with (tmp_path / "log").open("wb") as log:  # a pipe would be waited for by the VMMs that are left behind
        while (
            code := subprocess.run(words, env=env, stdout=log, stderr=log, timeout=LONG_S, check=False).returncode
        ) < 0:
            assert code == -signal.SIGKILL
    assert (code, (tmp_path / "log").read_text()) == (0, "")
    assert {f"resume.start.{name}.after" for name in SIZES} < set(seen.read_text().splitlines())
    all_are_back(place)
