"""``guest start|attach|helper|stop|pause|resume``: what they refuse, and what their steps make of guests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, Live, M, desks, grant, guest, region
from support.waiting import until

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import StateChange, WindowGrant
from memconsole.backend.verbs import guests, prepare
from memconsole.errors import Gone, GuestError
from memconsole.model import GrantState, GuestKind, GuestState, Helper, Quarantine

GONE = 2**22 + 1
"""A PID no Linux gives (PID_MAX_LIMIT is 2**22)."""
KTHREAD = 2


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A canary ``vm`` on region ``ram`` (g1), a process ``db`` on ``web`` (g2), and ``old``, which ended (g3)."""
    with desks(
        tmp_path,
        regions=(region("ram"), region("web"), region("left")),
        guests=(guest("vm", GuestKind.CANARY, pid=4001), guest("db"), guest("old", pid=4002)),
        grants=(grant("g1", "ram", "vm", gpa=0), grant("g2", "web", "db"), grant("g3", "left", "old")),
        live=(Live("vm", GuestKind.CANARY, 4001), Live("db")),
        strangers=(guest("qemu-812", GuestKind.FOREIGN, pid=812),),
    ) as made:
        yield made


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()", "some words"], stdin=subprocess.PIPE) as process:
        until(lambda: "some words" in census.command("/", process.pid), "it is what it says")
        yield process
        process.kill()


def codes(desk: Desk, action: do.Action) -> list[str]:
    made = prepare(desk, action)
    assert bool(made.refusals) != bool(made.steps)
    assert all(each.remedy or each.why for each in made.refusals)
    return [each.code for each in made.refusals]


@pytest.mark.parametrize(
    ("action", "refused"),
    [
        (do.GuestStart("vm"), ["NameTaken"]),
        (do.GuestStart("web"), ["NameTaken", "NameInCustody"]),
        (do.GuestStart("a b"), ["BadName"]),
        (do.GuestStart("new", vmm="bochs"), ["NoSuchVmm"]),
        (do.GuestStart("new", memory=0), ["BadSize"]),
        (do.GuestStart("new", memory=1 << 50), ["NoMemory"]),
        (do.GuestStart("new", agent=True), ["NoAgent"]),
        (do.GuestStart("new", device="0000:00:04.0"), ["NoDevices"]),
        (do.GuestAttach("db", 1), ["NameTaken"]),
        (do.GuestAttach("a/b", 1), ["BadName"]),
        (do.GuestAttach("new", GONE), ["NoSuchProcess"]),
        (do.GuestAttach("new", 0), ["NoSuchProcess"]),
        (do.GuestAttach("new", KTHREAD), ["NotAProcess"]),
        (do.GuestAttach("new", os.getpid()), ["Itself"]),
        (do.GuestHelper("none", 1), ["NoSuchGuest"]),
        (do.GuestHelper("vm", GONE), ["NoSuchProcess"]),
        (do.GuestHelper("vm", os.getpid()), ["Itself"]),
        (do.GuestStop("none"), ["NoSuchGuest"]),
        (do.GuestStop("qemu-812"), ["Foreign"]),
        (do.GuestPause("none"), ["NoSuchGuest"]),
        (do.GuestPause("old"), ["GuestGone"]),
        (do.GuestResume("none"), ["NoSuchGuest"]),
        (do.GuestResume("db"), ["NotPaused"]),
    ],
)
def test_what_cannot_be_done_with_a_guest_is_refused_by_name(desk: Desk, action: do.Action, refused: list[str]) -> None:
    if getattr(action, "pid", 0) == KTHREAD and not census.process("/", KTHREAD).kernel:
        pytest.skip("this PID namespace has no threads of the kernel")
    found = codes(desk, action)
    assert found[: len(refused)] == refused


def test_a_stranger_is_named_with_what_would_make_it_a_guest(desk: Desk) -> None:
    (refusal,) = prepare(desk, do.GuestStop("qemu-812")).refusals
    assert refusal.remedy == "memconsole guest adopt qemu-812 --qmp PATH"


def test_a_vmm_that_is_not_installed_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert codes(desk, do.GuestStart("new", vmm="qemu")) == ["NoVmm"]


# --- start --------------------------------------------------------------------------------------------------------


def test_a_canary_runs_on_a_region_of_its_own(desk: Desk) -> None:
    made = prepare(desk, do.GuestStart("new", memory=8 * M))
    assert [step.id for step in made.steps] == ["create", "hold", "spawn", "offer"]
    assert made.subject == "new"
    desk.carry(steps.run("guest-start", made.steps))
    (running,) = made.change.guests
    (mapped,) = made.change.grants
    assert (running.name, running.state, running.pid) == ("new", GuestState.RUNNING, 5000)
    assert (mapped.id, mapped.region, mapped.state, mapped.gpa) == ("g4", "new", GrantState.MAPPED, 0)
    assert [each.name for each in made.change.regions] == ["new"]
    live = desk.live_guest("new")
    assert live is not None
    assert live.did == ["offer g4"]


def test_a_canary_that_cannot_map_its_ram_leaves_nothing(desk: Desk) -> None:
    made = prepare(desk, do.GuestStart("new", memory=8 * M))
    spawned = made.steps[2].do

    def spawn() -> None:
        spawned()
        live = desk.live_guest("new")
        assert live is not None
        live.trouble = GuestError("new cannot map it")

    made.steps[2] = steps.Step("spawn", "", spawn, made.steps[2].undo)
    with pytest.raises(GuestError, match="cannot map it"):
        desk.carry(steps.run("guest-start", made.steps))
    assert desk.live_guest("new") is None
    assert not desk.holds_region("new")
    assert not [name for name in desk.custody.names() if "new" in name]


def test_a_vm_that_does_not_come_up_leaves_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(*_: object) -> Live:
        raise GuestError("new did not start")

    monkeypatch.setattr(desk, "start_guest", deaf)
    made = prepare(desk, do.GuestStart("new", memory=8 * M))
    with pytest.raises(GuestError, match="did not start"):
        desk.carry(steps.run("guest-start", made.steps))
    assert not desk.holds_region("new")


def test_a_qemu_gets_the_whole_region_as_its_ram(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "qemu-system-x86_64"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    made = prepare(desk, do.GuestStart("new", vmm="qemu", memory=8 * M, agent=True, args=("-accel", "tcg")))
    assert [step.id for step in made.steps] == ["create", "hold", "spawn"]
    assert "with new as its RAM" in made.steps[2].text
    desk.carry(steps.run("guest-start", made.steps))
    (running,) = made.change.guests
    assert running.kind is GuestKind.QEMU
    assert running.command[-2:] == ("-accel", "tcg")
    assert any("guest_agent" in word or "qga" in word for word in running.command)


def test_the_processes_of_a_start_that_was_cut_short_are_found(desk: Desk) -> None:
    words = ["--socket", str(desk.runtime_dir / "agents"), "--name", "new"]
    with subprocess.Popen(["sh", *words[:0], "-c", "read x", *words], stdin=subprocess.PIPE) as other:
        assert [handle.pid for handle in guests.adopt_orphans(desk, "new")] == []
        other.kill()
    sleeps = "import sys; sys.stdin.read()"
    monitor = f"unix:{desk.directory('new') / 'qmp'},server=on,wait=off"
    with subprocess.Popen([sys.executable, "-c", sleeps, "-qmp", monitor], stdin=subprocess.PIPE) as vmm:
        until(lambda: monitor in census.command("/", vmm.pid), "it is what it says")
        found = list(guests.adopt_orphans(desk, "new"))
        assert [handle.pid for handle in found] == [vmm.pid]
        for handle in found:
            handle.close()
        vmm.kill()


# --- attach, helper -----------------------------------------------------------------------------------------------


def test_a_process_joins_as_a_guest(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    made = prepare(desk, do.GuestAttach("new", sleeper.pid))
    (step,) = made.steps
    assert f"take process {sleeper.pid} (" in step.text
    desk.carry(steps.run("guest-attach", made.steps))
    (joined,) = made.change.guests
    assert (joined.kind, joined.pid, joined.command[-1]) == (GuestKind.PROCESS, sleeper.pid, "some words")
    assert step.undo is not None
    step.undo()
    assert desk.live_guest("new") is None


def test_a_process_that_is_a_guest_already_is_refused(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    with desks(tmp_path, guests=(guest(pid=sleeper.pid),), live=(Live("db", pid=sleeper.pid),)) as desk:
        assert codes(desk, do.GuestAttach("new", sleeper.pid)) == ["AlreadyGuest"]


def test_a_process_takes_the_place_of_one_that_ended_with_its_grants(
    desk: Desk, sleeper: subprocess.Popen[bytes]
) -> None:
    desk.userfaults.served.add("g3")
    made = prepare(desk, do.GuestAttach("old", sleeper.pid))
    assert made.text == f"process {sleeper.pid} is guest old again, with 1 grants"
    desk.carry(steps.run("guest-attach", made.steps))
    (found,) = made.change.guests
    assert (found.name, found.pid, found.state) == ("old", sleeper.pid, GuestState.RUNNING)
    assert [(each.id, each.state) for each in made.change.grants] == [("g3", GrantState.OFFERED)]
    assert desk.userfaults.served == set()
    assert desk.live_guest("old") is not None


def test_a_process_that_ends_before_it_joins_is_named(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    made = prepare(desk, do.GuestAttach("old", sleeper.pid))
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(Gone):
        desk.carry(steps.run("guest-attach", made.steps))


def test_a_thread_is_no_process(desk: Desk) -> None:
    sleeps = "import threading, sys; threading.Thread(target=input).start(); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", sleeps], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        task = Path(f"/proc/{process.pid}/task")
        until(lambda: len(list(task.iterdir())) > 1, "it has another thread")
        thread = next(int(each.name) for each in task.iterdir() if int(each.name) != process.pid)
        (refusal,) = prepare(desk, do.GuestAttach("new", thread)).refusals
        assert (refusal.code, refusal.remedy) == ("NotAProcess", f"attach process {process.pid}")
        process.kill()


def test_a_helper_is_written_down_beside_those_that_live(desk: Desk, sleeper: subprocess.Popen[bytes]) -> None:
    alive = Helper(os.getpid(), census.process("/", os.getpid()).start_ticks, ())
    meant = desk.state.guests["vm"]
    import msgspec

    desk.change(StateChange(guests=(msgspec.structs.replace(meant, helpers=(alive, Helper(GONE, 1, ()))),)))
    made = prepare(desk, do.GuestHelper("vm", sleeper.pid))
    desk.carry(steps.run("guest-helper", made.steps))
    (found,) = made.change.guests
    assert [each.pid for each in found.helpers] == [os.getpid(), sleeper.pid]


# --- stop ---------------------------------------------------------------------------------------------------------


def test_a_vm_ends_and_its_region_stays(desk: Desk) -> None:
    live = desk.live_guest("vm")
    directory = desk.directory("vm")
    directory.mkdir(parents=True)
    made = prepare(desk, do.GuestStop("vm"))
    assert [step.id for step in made.steps] == ["end", "part"]
    desk.carry(steps.run("guest-stop", made.steps))
    assert live is not None
    assert live.did == ["stop", "close"]
    assert not directory.exists()
    assert made.change == StateChange(without_guests=("vm",), without_grants=("g1",))
    assert desk.holds_region("ram")


def test_a_vm_that_ended_is_only_forgotten(tmp_path: Path) -> None:
    with desks(tmp_path, guests=(guest("vm", GuestKind.CANARY),)) as desk:
        assert [step.id for step in prepare(desk, do.GuestStop("vm")).steps] == ["part"]


def test_a_process_is_let_go_once_it_gave_its_grants_back(desk: Desk) -> None:
    live = desk.live_guest("db")
    made = prepare(desk, do.GuestStop("db"))
    assert [step.id for step in made.steps] == ["cut-g2", "part"]
    desk.carry(steps.run("guest-stop", made.steps))
    assert live is not None
    assert live.did == ["unmap g2", "close"]
    assert made.lasting.without_grants == ("g2",)


def test_a_process_with_a_window_is_not_stopped(desk: Desk) -> None:
    desk.change(StateChange(windows=(WindowGrant("g9", "0000:00:04.0:0", "db", 1),)))
    (refusal,) = prepare(desk, do.GuestStop("db")).refusals
    assert (refusal.code, refusal.remedy) == ("Granted", "memconsole window revoke 0000:00:04.0:0")


# --- pause, resume ------------------------------------------------------------------------------------------------


def test_a_guest_is_paused_and_goes_on(desk: Desk) -> None:
    live = desk.live_guest("vm")
    assert live is not None
    made = prepare(desk, do.GuestPause("vm"))
    desk.carry(steps.run("guest-pause", made.steps))
    assert [each.state for each in made.change.guests] == [GuestState.PAUSED]
    assert codes(desk, do.GuestPause("vm")) == ["NotRunning"]
    again = prepare(desk, do.GuestResume("vm"))
    desk.carry(steps.run("guest-resume", again.steps))
    assert live.did == ["pause", "resume"]
    assert again.steps[0].undo == live.pause
    assert again.after is not None
    again.after()


def test_the_plan_for_a_process_says_which_signal_it_gets(desk: Desk) -> None:
    assert prepare(desk, do.GuestPause("db")).steps[0].text == "stop process 4000 (SIGSTOP)"


def test_a_quarantine_is_no_guest(desk: Desk) -> None:
    desk.change(StateChange(quarantine=(Quarantine("g1", "ram", "vm", M, 1, ""),)))
    assert codes(desk, do.GuestPause("g1")) == ["NoSuchGuest"]
