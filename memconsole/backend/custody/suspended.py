"""What custody holds of a guest that gave its RAM back by ending: its state, and how to start it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from memconsole.backend.custody import payloads
from memconsole.errors import NotFound
from memconsole.model import Value

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody

STATE, PLAN = "aside", "aside-plan"
"""What the two entries of a guest are called, before its name."""


class SuspendedGuest(Value, frozen=True):
    """What a state in custody is of: the region that is the guest's RAM, and whether it was paused before."""

    region: str
    paused: bool


def read(custody: Custody, guest: str) -> SuspendedGuest | None:
    """What is kept of a guest that waits, if it does.

    Raises:
        BadFile: this memconsole cannot read it.
    """
    try:
        return payloads.held(custody, f"{STATE}:{guest}", SuspendedGuest)
    except NotFound:
        return None


def drop(custody: Custody, guest: str) -> None:
    """Forget what was saved of a guest, if anything was."""
    for kind in (STATE, PLAN):
        with contextlib.suppress(NotFound):
            custody.drop(f"{kind}:{guest}")
