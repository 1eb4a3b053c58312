"""What a control process sees to of itself: when a Snapshot is taken for the mount, and when one is there already."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole.backend import upkeep
from memconsole.backend.kernel import census
from memconsole.backend.ledger.state import State
from memconsole.backend.observe.survey import GuestReply
from memconsole.backend.peers import handle
from memconsole.model import Guest, GuestKind, GuestState, Snapshot


class Shown:
    """A mount that notes what it is shown."""

    def __init__(self) -> None:
        self.owners: list[dict[str, int]] = []
        self.shown: list[Snapshot] = []

    def ping(self) -> None:
        """It is there."""

    def sync(self, owners: dict[str, int]) -> None:
        self.owners.append(owners)

    def show_status(self, snapshot: Snapshot) -> None:
        self.shown.append(snapshot)


class Kept:
    """What is kept up: one guest, this process."""

    handoff = None

    def __init__(self) -> None:
        self.root = Path("/")
        self.mount: Shown | None = None
        me = Guest(
            "web", GuestKind.PROCESS, GuestState.RUNNING, pid=os.getpid(), start_ticks=handle.stat(os.getpid())[1]
        )
        self.state = State(guests={"web": me})
        self.says = GuestState.RUNNING

    def guest_replies(self, deadline: float) -> dict[str, GuestReply]:
        return {"web": GuestReply(self.says)}


class World:
    """An upkeep whose seconds never come, and the Snapshots it took."""

    def __init__(self) -> None:
        self.desk = Kept()
        self.taken = 0
        self.seen = cast("Any", upkeep.Upkeep)(
            self.desk, threading.RLock(), self._take, lambda _: None, None, apply=lambda _: None, carried=lambda: None
        )
        self.desk.mount = self.mount = Shown()

    def _take(self) -> Snapshot:
        self.taken += 1
        found = self.made()
        self.seen.note_snapshot(found)
        return found

    @staticmethod
    def made() -> Snapshot:
        return replace(synthetic.snapshot(), taken_ns=time.time_ns())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("EVERY_S", "MOVES_S", "AT_ONCE_S", "RECENT_S"):
        monkeypatch.setattr(upkeep, name, 3600.0)
    made = World()
    yield made
    made.seen.close()


def test_for_a_mount_nobody_surveys_what_has_not_changed(world: World) -> None:
    for _ in range(3):
        world.seen.show_on_mount()
    assert world.taken == 1
    assert len(world.mount.shown) == len(world.mount.owners) == 3


def test_what_somebody_else_saw_is_shown_on_the_mount(world: World) -> None:
    world.seen.show_on_mount()
    newer = world.made()
    world.seen.note_snapshot(newer)
    world.seen.show_on_mount()
    assert world.taken == 1
    assert world.mount.shown[-1] is newer


@pytest.mark.parametrize("what", ["ledger", "state", "user", "process"])
def test_what_changed_is_seen_anew_for_the_mount(world: World, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world.seen.show_on_mount()
    assert world.mount.owners[-1] == {"web": os.geteuid()}
    if what == "ledger":
        world.desk.state = replace(world.desk.state)
    elif what == "state":
        world.desk.says = GuestState.PAUSED
    elif what == "user":
        monkeypatch.setattr(census, "uid", lambda root, pid: 65534)
    else:
        monkeypatch.setattr(handle, "stat", lambda pid: ("S", 1))
    world.seen.show_on_mount()
    assert world.taken == 2
    assert world.mount.owners[-1] == {"user": {"web": 65534}, "process": {}}.get(what, {"web": os.geteuid()})
    world.seen.show_on_mount()
    assert world.taken == 2
