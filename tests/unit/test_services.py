"""Services: how they are described, started behind a gate, told to save, and started again; systemctl is a stand-in."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.desks import Desk, Facts, Live, Mount, desk_of, grant, guest, region
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.guests import programs, service, units
from memconsole.backend.handoff import bootplan, services
from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.steps import run
from memconsole.backend.verbs import prepare
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import GrantState, Guest, GuestState, Service

MC = ("memcached", "-m", "64", "-e", "cache")


def served(**more: Any) -> Guest:
    return replace(guest("mc"), service=Service(**{"command": MC, "save_signal": "SIGUSR1", **more}), command=MC)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A service ``mc`` that runs, with a grant."""
    facts = Facts(
        regions=(region("cache"),),
        guests=(served(),),
        grants=(grant(region="cache", guest="mc"),),
        live=(Live("mc"),),
    )
    with desk_of(tmp_path, facts) as desk:
        desk.mount = Mount()
        yield desk


def ended(desk: Desk) -> None:
    desk.lives("mc").says = GuestState.GONE


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({}, "NoCommand"),
        ({"unit": "a.service", "exec": "b"}, "TwoWays"),
        ({"exec": "b", "save_signal": "SIGNOT"}, "NoSuchSignal"),
        ({"exec": "b", "within": 0.0}, "BadDeadline"),
        ({"exec": "b", "user": "no such user"}, "NoService"),
        ({"exec": "'b"}, "NoService"),
    ],
)
def test_what_is_no_service_is_refused_by_name(desk: Desk, words: dict[str, Any], code: str) -> None:
    assert [each.code for each in prepare(desk, do.GuestService("new", **words)).refusals] == [code]
    assert [each.code for each in prepare(desk, do.GuestService("mc", exec="b")).refusals] == ["NameTaken"]


def test_a_service_is_noted_and_waits_for_its_grants(desk: Desk) -> None:
    work = prepare(desk, do.GuestService("new", exec="sleep 9", user="0", save_signal="usr1"))
    assert not work.refusals
    desk.carry(run("t", work.steps))
    desk.change(work.change)
    made = desk.state.guests["new"]
    assert (made.state, made.pid) == (GuestState.GONE, None)
    assert made.service == Service(command=("sleep", "9"), save_signal="SIGUSR1")
    assert "memconsole guest resume new" in work.text
    desk.change(replace(work.change, without_grants=("g1",)))
    work = prepare(desk, do.Map("cache", "new"))
    desk.carry(run("t", work.steps))
    assert [each.state for each in work.change.grants] == [GrantState.OFFERED]


def test_a_process_is_a_service_by_its_own_words_user_and_directory(desk: Desk) -> None:
    with service.GatedStart(Service(command=("sleep", "99"), directory="/usr"), desk.runtime_dir / "log") as gate:
        gate.open()
        until(lambda: census.command("/", gate.pid) == ("sleep", "99"), "it is the program")
        work = prepare(desk, do.GuestAttach("new", gate.pid, save="true"))
        desk.carry(run("t", work.steps))
        how = work.change.guests[0].service
        assert how is not None
        assert (how.command, how.directory, how.user) == (("sleep", "99"), "/usr", os.geteuid())
        assert (how.save, how.save_signal) == ("true", "SIGTERM")
        os.kill(gate.pid, signal.SIGKILL)


def test_a_gate_that_nobody_opens_starts_nothing(tmp_path: Path) -> None:
    with service.GatedStart(Service(command=("touch", str(tmp_path / "ran"))), tmp_path / "log") as gate:
        assert census.process("/", gate.pid)
    until(lambda: not Path(f"/proc/{gate.pid}").exists(), "it has ended and was waited for")
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="cannot be started"):
        service.GatedStart(Service(command=("true",), directory=str(tmp_path / "no")), tmp_path / "log")


def test_it_is_started_with_its_grants_recorded_before_it_is_the_program(desk: Desk, tmp_path: Path) -> None:
    ended(desk)
    ran = tmp_path / "ran"
    how = Service(command=("sh", "-c", f"touch {ran}; exec sleep 99"), ready=f"test -e {ran}")
    desk.change(StateChange(guests=(replace(served(), service=how, command=()),)))
    work = prepare(desk, do.GuestResume("mc"))
    assert [step.id for step in work.steps] == ["start", "ready"]
    desk.carry(run("t", work.steps))
    recorded = desk.state.guests["mc"]
    assert recorded.state is GuestState.RUNNING
    assert recorded.pid is not None
    assert desk.state.grants["g1"].state is GrantState.OFFERED
    assert desk.mount is not None
    assert desk.mount.synced == 1
    assert ran.exists()
    os.kill(recorded.pid, signal.SIGKILL)


def test_it_is_told_waited_for_and_started_again_when_that_is_taken_back(desk: Desk) -> None:
    work = PreparedAction("", "")
    mc = desk.state.guests["mc"]
    steps = [*services.saving(desk, work, mc), *services.saved(desk, mc)]
    assert [step.id for step in steps] == ["tell-mc", "saved-mc"]
    desk.carry(run("t", steps))
    assert desk.lives("mc").did == ["SIGUSR1"]
    assert services.marked(desk) == ["mc"]
    assert steps[0].undo is not None
    steps[0].undo()
    assert work.then == [do.GuestResume("mc")]


def test_one_that_does_not_end_in_time_fails_the_handoff_and_is_started_once_it_has(desk: Desk) -> None:
    desk.lives("mc").obeys = False
    mc = replace(served(), service=Service(command=MC, within=0.1))
    work = PreparedAction("", "")
    with pytest.raises(GuestError, match="mc has not saved"):
        desk.carry(run("t", [*services.saving(desk, work, mc), *services.saved(desk, mc)]))
    assert work.then == []
    assert services.due(desk, ()) is None, "it runs, and may be saving"
    ended(desk)
    desk.change(StateChange(guests=(replace(mc, command=("lmdb",)),)))
    assert services.due(desk, ()) == do.GuestResume("mc")
    assert services.due(desk, {"mc"}) is None


def test_a_save_command_that_fails_leaves_it_running(desk: Desk) -> None:
    mc = replace(served(), service=Service(command=MC, save="echo no >&2; exit 3"))
    with pytest.raises(GuestError, match="mc did not save") as failed:
        desk.carry(run("t", list(services.saving(desk, PreparedAction("", ""), mc))))
    assert "ended with 3: no" in str(failed.value)
    assert desk.lives("mc").did == []
    assert services.marked(desk) == []


def test_a_clock_that_is_behind_holds_memcached_and_nobody_else(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    mc = desk.state.guests["mc"]
    now = bootplan.moment()
    later = bootplan.ClockReading(now.ticks, now.boottime_ns, time.time_ns() + 3600 * 10**9)
    monkeypatch.setattr(bootplan, "moment", lambda: later)
    desk.carry(run("t", list(services.saving(desk, PreparedAction("", ""), mc))))
    monkeypatch.undo()
    assert services.early_by(desk, mc) > 3599 * 10**9
    assert services.early_by(desk, replace(mc, command=("postgres",))) == 0
    assert services.due(desk, ()) is None
    work = prepare(desk, do.GuestResume("mc"))
    with pytest.raises(MemconsoleError, match="behind the moment at which it saved") as held:
        desk.carry(run("t", work.steps))
    assert held.value.code == "ClockBehind"
    assert services.marked(desk) == ["mc"], "nothing was lost"


@pytest.mark.parametrize(
    ("words", "number", "cold"),
    [
        (MC, "SIGUSR1", ""),
        (MC, "SIGTERM", "SIGUSR1 alone"),
        (("/usr/bin/memcached", "-m", "64"), "SIGUSR1", "memory of its own"),
        (("redis-server *:6379",), "", "heap"),
        (("postgres: checkpointer ",), "", "buffers"),
    ],
)
def test_programs_are_known_by_their_words(words: tuple[str, ...], number: str, cold: str) -> None:
    found = programs.recognised(words, number)
    assert found is not None
    assert cold in found.cold
    assert bool(found.cold) is bool(cold)
    assert bool(found.instead) is bool(cold)


def test_a_program_that_nobody_knows_is_not_judged() -> None:
    assert programs.recognised(("python3", "db.py")) is None
    assert programs.recognised(()) is None


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in, which says that a unit's process is this one; the file of what it was asked."""
    log, tool = tmp_path / "asked", tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    shown = f"MainPID={os.getpid()}\\nKillSignal=15\\nLoadState=loaded\\nUser=root\\n"
    tool.write_text(f'#!/bin/sh\necho "$*" >> {log}\n[ "$1" != show ] || printf "{shown}"\n[ "$3" != bad ]\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setattr(units, "MANAGER", str(tmp_path / "units"))
    (tmp_path / "units").mkdir()
    return log


def test_a_unit_is_stopped_by_the_signal_that_has_it_save(systemctl: Path, tmp_path: Path) -> None:
    units.stop("mc.service", signal.SIGUSR1, 60)
    written = (tmp_path / "units" / "mc.service.d" / units.DROP_IN).read_text()
    assert written == "[Service]\nKillSignal=SIGUSR1\nTimeoutStopSec=60\n"
    asked = systemctl.read_text().splitlines()
    assert asked[1:] == ["daemon-reload", "stop --no-block -- mc.service"]


def test_a_unit_that_has_the_signal_is_left_as_it_is(systemctl: Path, tmp_path: Path) -> None:
    units.stop("mc.service", signal.SIGTERM, 60)
    assert not (tmp_path / "units" / "mc.service.d").exists()
    assert systemctl.read_text().splitlines()[1:] == ["stop --no-block -- mc.service"]


def test_a_unit_is_started_and_its_process_is_the_guest(systemctl: Path, desk: Desk) -> None:
    ended(desk)
    how = Service(unit="mc.service")
    desk.change(StateChange(guests=(replace(served(), service=how, command=()),)))
    work = prepare(desk, do.GuestResume("mc"))
    desk.carry(run("t", work.steps))
    assert desk.state.guests["mc"].pid == os.getpid()
    assert "start -- mc.service" in systemctl.read_text()
    ended(desk)
    assert services.due(desk, ()) == do.GuestAttach("mc", os.getpid()), "systemd started it by itself"


def test_a_unit_that_does_not_start_is_named(systemctl: Path) -> None:
    with pytest.raises(GuestError, match="systemctl start bad failed"):
        units.start("bad", 5)
    assert systemctl.read_text() == "start -- bad\n"


def test_without_systemd_there_are_no_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, desk: Desk) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (refusal,) = prepare(desk, do.GuestService("new", unit="a.service")).refusals
    assert refusal.code == "NoService"
    assert "systemd does not run this host" in refusal.why
