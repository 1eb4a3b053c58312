"""The control process dies at every step boundary of every action, and the next one finds all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import M, goes_on, grant, guest, raised, region
from support.faultpoints import fault_points
from support.guests import AgentProcess
from support.waiting import until
from support.worlds import World, worlds

from memconsole import actions as do
from memconsole.backend import adoption, desk
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.ledger.writer import LEDGER
from memconsole.errors import BadFile
from memconsole.model import GrantState, GuestState, Rung


@pytest.fixture
def world() -> Iterator[World]:
    with worlds() as made:
        yield made


STALLED_NS = 5 * 10**9
"""A pause no scheduler makes: a canary that waited for somebody who had died."""

MORE = [do.Reserve("more", 2 * M), do.Map("more", "watch", gpa=1 << 30)]
SCENARIOS: dict[str, tuple[list[do.Action], do.Action]] = {
    "reserve": ([], do.Reserve("new", 2 * M, prefault=True)),
    "release": ([do.Reserve("old", 2 * M)], do.Release("old")),
    "map": (MORE[:1], MORE[1]),
    "revoke": (MORE, do.Revoke("g2")),
    "guest-start": ([], do.GuestStart("second", memory=2 * M)),
    "guest-stop": ([do.GuestStart("second", memory=2 * M)], do.GuestStop("second")),
    "guest-pause": ([do.GuestStart("second", memory=2 * M)], do.GuestPause("second")),
    "guest-resume": ([do.GuestStart("second", memory=2 * M), do.GuestPause("second")], do.GuestResume("second")),
}
if shutil.which("qemu-system-x86_64"):
    SCENARIOS["guest-start-qemu"] = ([], do.GuestStart("vm", vmm="qemu", memory=16 * M))


def set_up(world: World, actions: list[do.Action]) -> tuple[object, ...]:
    with world.control() as control:
        for action in (do.GuestStart("watch", memory=4 * M), *actions):
            control.apply(action)
        goes_on(control, "watch")
        return world.essence(control)


@pytest.mark.parametrize("name", SCENARIOS)
def test_an_action_cut_anywhere_is_wholly_there_or_wholly_not(name: str) -> None:
    before_it, action = SCENARIOS[name]
    with worlds() as world:
        before = set_up(world, before_it)
        with world.control() as control:
            points = fault_points(control.plan(action))
            control.apply(action)
            after = world.essence(control)
    assert points
    assert before != after
    for point in points:
        with worlds() as world:
            assert set_up(world, before_it) == before
            world.dies(action, point)
            with world.control() as control:
                until(lambda: control._desk.live_guest("watch").agent(), "the canary came back")  # type: ignore[union-attr]
                assert control._state.unfinished == {}, point
                assert world.essence(control) in (before, after), point
                assert [found for found in raised(control.snapshot()) if found.subject != "watch"] == [], point
                goes_on(control, "watch")
                progress = guest(control.snapshot(), "watch").progress
                assert progress is not None
                assert progress.gap_ns < STALLED_NS, point


def test_everything_is_taken_over_and_goes_on(world: World) -> None:
    with world.control() as control:
        control.apply(do.GuestStart("watch", memory=4 * M))
        control.apply(do.Reserve("web", 2 * M, prefault=True))
        first = control.snapshot()
        events = control.events(0)
    with world.control() as control:
        until(lambda: guest(control.snapshot(), "watch").agent, "the canary came back")
        second = control.snapshot()
        assert [found.segments for found in second.regions] == [found.segments for found in first.regions]
        assert second.grants == first.grants
        assert guest(second, "watch").pid == guest(first, "watch").pid
        assert raised(second) == []
        assert control.events(0) == events
        goes_on(control, "watch")
        control.apply(do.Reserve("next", M))
        control.apply(do.Map("next", "watch", gpa=1 << 30))
        assert grant(control.snapshot(), "g2").state is GrantState.MAPPED
        control.apply(do.GuestStop("watch"))
        assert world.processes() == []


def test_a_process_keeps_its_grants_over_a_restart(world: World) -> None:
    with AgentProcess(world.runtime / "agents") as process:
        with world.control() as control:
            control.apply(do.Reserve("cache", M))
            control.apply(do.GuestAttach("db", process.pid))
            control.apply(do.Map("cache", "db"))
            assert process.do("wait g1") == "g1"
            process.do("write g1 hello")
        assert process.do("read g1 5") == "hello"
        with world.control() as control:
            until(lambda: guest(control.snapshot(), "db").agent, "the agent came back")
            assert process.do("read g1 5") == "hello"
            control.apply(do.Revoke("g1", at_most=Rung.ASK))
            assert process.do("grants") == "none"


def test_a_busy_process_is_given_the_time_to_let_go_of_a_grant_that_was_cut_short(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "RECONNECT_S", 1.0)
    monkeypatch.setattr(adoption, "OFFER_S", 1.0)
    with AgentProcess(world.runtime / "agents") as process:
        with world.control() as control:
            control.apply(do.Reserve("cache", M))
            control.apply(do.GuestAttach("db", process.pid))
            map_it = do.Map("cache", "db")
            (point,) = [each for each in fault_points(control.plan(map_it)) if each.endswith("offer.after")]
        world.dies(map_it, point, "db")
        assert process.do("grants") == "g1"
        assert process.do("spin 4") == "spins"
        with world.control() as control:
            assert control.snapshot().grants == ()
            assert process.line() == "done"
            until(lambda: process.do("grants") == "none", "it let go")


def test_a_guest_that_died_meanwhile_is_a_finding(world: World) -> None:
    with world.control() as control:
        control.apply(do.GuestStart("watch", memory=4 * M))
        pid = guest(control.snapshot(), "watch").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with world.control() as control:
        assert guest(control.snapshot(), "watch").state is GuestState.GONE
        assert [found.id for found in raised(control.snapshot())] == ["guest-gone"]
        control.apply(do.GuestStop("watch"))
        control.apply(do.Release("watch"))


def test_a_region_the_ledger_lost_is_taken_over_with_a_finding(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M, prefault=True))
        inode = region(control.snapshot(), "web").segments[0].inode
        control._desk.custody.drop(LEDGER)
    with world.control() as control:
        snapshot = control.snapshot()
        assert region(snapshot, "web").segments[0].inode == inode
        assert [(found.id, found.subject) for found in raised(snapshot)] == [("region-found", "web")]
        control.apply(do.Release("web"))
        assert raised(control.snapshot()) == []


def test_a_region_custody_lost_is_a_finding_and_can_be_forgotten(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", 2 * M))
        control._desk.custody.drop("region:web:0")
    with world.control() as control:
        assert [(found.id, found.subject) for found in raised(control.snapshot())] == [("region-lost", "web")]
        control.apply(do.Release("web"))
        assert raised(control.snapshot()) == []
        assert control.snapshot().regions == ()


def test_an_fd_nobody_knows_is_a_finding(world: World) -> None:
    with world.control() as control:
        fd = os.memfd_create("stranger")
        control._desk.custody.put("region:who:0", fd, b"?")
        os.close(fd)
    with world.control() as control:
        assert [(found.id, found.subject) for found in raised(control.snapshot())] == [("custody-unknown", "who")]
        assert control.snapshot().regions == ()


def test_a_long_ledger_is_compacted_and_means_the_same(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("stays", M))
        for n in range(600):
            control.apply(do.Reserve("web", 4096))
            control.apply(do.Release("web"))
            if n == 590:
                assert control._ledger._ledger.generation > 1
        seq = control.events(0)[-1].seq
    with world.control() as control:
        assert [found.name for found in control.snapshot().regions] == ["stays"]
        control.apply(do.Reserve("web", 4096))
        assert control.events(0)[-1].seq > seq


def test_a_ledger_that_cannot_be_believed_stops_the_start_and_keeps_the_memory(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", M, prefault=True))
        os.pwrite(control._ledger._ledger.fd, bytes(8192), 0)
    with contextlib.closing(KeeperCustody(world.keeper)) as custody:
        with pytest.raises(BadFile, match="ledger"):
            Control(world.runtime, custody)
        assert "region:web:0" in custody.names()
        custody.drop(LEDGER)
    with world.control() as control:
        assert [found.name for found in control.snapshot().regions] == ["web"]


def test_a_ledger_cut_in_the_middle_of_a_record_is_a_finding(world: World) -> None:
    with world.control() as control:
        control.apply(do.Reserve("web", M))
        end = control._ledger._ledger._end
        os.pwrite(control._ledger._ledger.fd, b"torn", end + 4)
    with world.control() as control:
        assert [found.id for found in raised(control.snapshot())] == ["ledger-torn"]
        assert [found.name for found in control.snapshot().regions] == ["web"]


def test_the_audit_trail_has_what_was_done_and_who_asked(world: World, tmp_path: Path) -> None:
    custody = KeeperCustody(world.keeper)
    with contextlib.closing(Control(world.runtime, custody, state_dir=tmp_path)) as control:
        control.apply(do.Reserve("web", M), peer="uid 7")
        control.denied("uid 9", "Apply")
        audit = control._ledger._audit
        assert audit is not None
        audit.flush()
        kinds = [entry.kind for entry in audit.entries()]
        assert kinds == ["intent", "done", "event"]
        assert b"uid 7" in audit.entries()[0].payload
        assert [event.kind for event in control.events(0)] == ["reserve", "denied"]
