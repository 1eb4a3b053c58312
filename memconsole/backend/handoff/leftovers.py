"""What a handoff leaves when it is over, or was cut short: taken away before the next one begins."""

from __future__ import annotations

import contextlib

from memconsole.backend import needs
from memconsole.backend.custody.names import LANDED
from memconsole.backend.handoff import bootplan, devices
from memconsole.backend.handoff.cargo import take_back
from memconsole.errors import NotFound


def drop_leftovers(desk: needs.RegionFds) -> None:
    """Let go of what an earlier handoff left, in arenas and in custody: sessions, states, its manifest and resume."""
    take_back(desk)
    before = ("session:", "state:", bootplan.STARTED, devices.IOVA)
    left = [name for name in desk.custody.names() if name.startswith(before)]
    drop(desk, *left, bootplan.MANIFEST, bootplan.RESUME, LANDED)


def drop(desk: needs.InCustody, *names: str) -> None:
    """Let go of what custody has under these names, where it has it."""
    for name in names:
        with contextlib.suppress(NotFound):
            desk.custody.drop(name)
