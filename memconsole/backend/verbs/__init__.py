"""The verbs: each makes of an Action the steps that do it, or says why not; nothing changes until the steps run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memconsole import actions
from memconsole.backend.desk import Desk
from memconsole.backend.verbs import grants, guests, handoff, regions, windows
from memconsole.backend.verbs.work import Work

Verb = Callable[[Desk, Any], Work]

VERBS: Mapping[type[actions.Action], Verb] = {
    actions.Reserve: regions.reserve,
    actions.Release: regions.release,
    actions.Map: grants.map,
    actions.Revoke: grants.revoke,
    actions.GuestStart: guests.start,
    actions.GuestAttach: guests.attach,
    actions.GuestStop: guests.stop,
    actions.GuestPause: guests.pause,
    actions.GuestResume: guests.resume,
    actions.WindowMap: windows.map,
    actions.WindowRevoke: windows.revoke,
    actions.HandoffRun: handoff.run,
    actions.HandoffRehearse: handoff.rehearse,
}


def work(desk: Desk, action: actions.Action) -> Work:
    """What an Action amounts to on this desk, now."""
    return VERBS[type(action)](desk, action)
