"""A control process that dies in the middle of a rung: the next one finishes the revoke, and the contents are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import hostile
from support.controls import M
from support.hostile import SECRET
from support.waiting import until
from support.worlds import World, worlds

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.peers.handle import stat
from memconsole.backend.revoke import POINTS
from memconsole.extents import digest_fd

OF_STORES = "revoke.move.named"
"""Passed where a region moves to another store (test_move.py)."""
MOVED = [point for point in POINTS if ".move." in point and point != OF_STORES]
WAYS = {
    "ask": ("lie", [point for point in POINTS if ".ask." in point or point in MOVED]),
    "copy": ("ignore", [point for point in POINTS if ".ask." in point or ".copy." in point or point in MOVED]),
    "kill": ("ignore", [point for point in POINTS if ".kill." in point]),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("page flags and other users' processes are for root")
    return hostile.build(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def world() -> Iterator[World]:
    with worlds() as made:
        yield made


def let_in(control: Control, guest: hostile.Hostile) -> str:
    (fd,) = control._desk.fds("loot")
    for at in range(0, 4 * M, 4096):
        os.pwrite(fd, SECRET + at.to_bytes(8, "little"), at)
    control.apply(do.GuestAttach("hostile", guest.pid))
    until(lambda: control._desk.hub.connected("hostile"), "its agent is there")
    control.apply(do.Map("loot", "hostile", length=2 * M))
    guest.ready()
    return digest_fd(fd)


@pytest.mark.parametrize(("rung", "point"), [(rung, point) for rung, (_, points) in WAYS.items() for point in points])
def test_the_next_control_process_finishes_it(world: World, program: Path, rung: str, point: str) -> None:
    manners, _ = WAYS[rung]
    agents = world.runtime / "agents"
    with hostile.running(program, agents, manners) as guest, contextlib.ExitStack() as stack:
        with world.control() as control:
            control.apply(do.Reserve("loot", 4 * M))
            kept = let_in(control, guest)
        if rung == "kill":
            stack.enter_context(hostile.no_fresh_files())
        world.dies(do.Revoke("g1", within=0.5), point)
        with world.control() as control:
            snapshot = control.snapshot()
            assert control._state.unfinished == {}, [event.text for event in control.events(0)]
            assert snapshot.grants == ()
            (fd,) = control._desk.fds("loot")
            assert digest_fd(fd) == kept
            # One that was killed just before the control process died is found to be gone.
            # A keeper that may not exempt itself from the OOM killer is this machine's.
            leftover = {
                "frames-quarantined",
                "custody-unguarded",
                *(["guest-gone"] if point == "revoke.kill.after" else []),
            }
            assert {finding.id for finding in snapshot.findings} <= leftover
            held = [name for name in control._desk.custody.names() if not name.startswith("quarantine:")]
            assert held == ["ledger", "region:loot:0"]
            if rung == "kill":
                until(lambda: not guest.alive(), "it is dead")
                return
            assert stat(guest.pid)[0] not in "Tt", "it was let go on"
            after = guest.tries()
            leads = {way for way, what in after.items() if what == SECRET.decode()}
            assert leads <= hostile.PINS, after
            assert bool(leads) == bool(snapshot.quarantine), (after, snapshot.quarantine)


def test_the_points_are_all_passed() -> None:
    """Every point but those of the protect rung, which has a kernel of its own (tests/vm), and of moves to a store."""
    tested = {point for _, points in WAYS.values() for point in points}
    of_qemu = {"revoke.aside.saved", "revoke.aside.held"}
    of_protect = {f"revoke.protect.{moment}" for moment in ("before", "barred", "after")}
    assert set(POINTS) - tested == of_protect | of_qemu | {OF_STORES}
    assert shutil.which("cc")
