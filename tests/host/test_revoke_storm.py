"""Maps, forks and revokes in a storm: no process ever sees a byte of whoever has the memory after it."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest
from support import hostile
from support.controls import controls
from support.guests import open_fds, until
from support.hostile import Hostile

from memconsole import actions as do
from memconsole.model import RevokeOutcome, Rung

PAGE = 4096
SIZE = 64 * PAGE
SECONDS = 60 if os.environ.get("MEMCONSOLE_SOAK") else 6
CROWD = 50
REGIONS = 4


def test_no_page_is_reached_by_two_owners(tmp_path: Path) -> None:
    """Each guest, its forked child and whoever it sent its fd to keep trying after they were shut out."""
    if os.geteuid() != 0:
        pytest.skip("page flags and other users' processes are for root")
    program = hostile.build(tmp_path)
    before = open_fds()
    with controls() as control, contextlib.ExitStack() as stack:
        crowd: list[tuple[Hostile, str]] = []
        for number in range(REGIONS):
            control.apply(do.Reserve(f"r{number}", SIZE))
        turn = 0
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            name, word = f"r{turn % REGIONS}", b"%08d" % turn
            (fd,) = control._desk.fds(name)
            for at in range(0, SIZE, PAGE):
                os.pwrite(fd, word, at)
            if len(crowd) < CROWD:
                manners = ("ignore", "lie")[turn // REGIONS % 2]
                guest = stack.enter_context(hostile.running(program, control.runtime_dir / "agents", manners))
                control.apply(do.GuestAttach(f"p{turn}", guest.pid))
                until(lambda name=f"p{turn}": control._desk.hub.connected(name), "its agent is there")  # type: ignore[misc]
                grant = control.apply(do.Map(name, f"p{turn}")).subject
                guest.ready()
                report = control.apply(do.Revoke(grant, within=0.1)).revoke
                assert report is not None
                assert report.outcome is RevokeOutcome.QUARANTINED, report
                assert report.rung in {Rung.ASK, Rung.COPY}, report
                crowd.append((guest, word.decode()))
            for guest, own in crowd[-8:] if len(crowd) < CROWD else crowd:
                seen = guest.tries()
                others = {way: what for way, what in seen.items() if what.isdecimal() and what != own}
                assert others == {}, (guest.pid, own, others)
                assert {way for way, what in seen.items() if what == own} <= hostile.PINS, seen
            turn += 1
        assert len(crowd) > REGIONS
        assert len(control.snapshot().quarantine) == len(crowd)
        for guest, _ in crowd:
            guest.drops_pins()
        until(lambda: control.snapshot().quarantine == (), "every frame went back to the kernel")
    assert open_fds() == before
