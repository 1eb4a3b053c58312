"""The verbs: each makes of an Action the steps that do it, or says why not; nothing changes until the steps run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from memconsole import actions
from memconsole.backend import needs
from memconsole.backend.handoff.facets import HandoffChecks
from memconsole.backend.verbs import adopt, arenas, grants, guests, handoff, moves, regions, services, windows
from memconsole.backend.work import PreparedAction


class VerbDesk(
    HandoffChecks,
    arenas.ArenaKeeping,
    needs.OwnRegionFds,
    needs.GuestStarting,
    needs.GrantOffering,
    needs.FaultServing,
    needs.MmioWindows,
    Protocol,
):
    """All that the verbs need of a desk together, a facet each."""


Verb = Callable[[VerbDesk, Any], PreparedAction]

VERBS: Mapping[type[actions.Action], Verb] = {
    actions.Reserve: regions.reserve,
    actions.Release: regions.release,
    actions.Move: moves.move_region,
    actions.Map: grants.map,
    actions.Revoke: grants.revoke,
    actions.GuestStart: guests.start,
    actions.GuestAttach: guests.attach,
    actions.GuestService: services.add,
    actions.GuestHelper: guests.helper,
    actions.GuestAdopt: adopt.adopt,
    actions.GuestLetGo: adopt.let_go,
    actions.GuestStop: guests.stop,
    actions.GuestPause: guests.pause,
    actions.GuestResume: guests.resume,
    actions.WindowMap: windows.map,
    actions.WindowRevoke: windows.revoke,
    actions.ArenaCreate: arenas.create,
    actions.ArenaScan: arenas.scan,
    actions.ArenaGrow: arenas.grow,
    actions.ArenaRemove: arenas.remove,
    actions.HandoffRun: handoff.run,
    actions.HandoffRehearse: handoff.rehearse,
}


def prepare(desk: VerbDesk, action: actions.Action) -> PreparedAction:
    """What an Action amounts to on this desk, now."""
    return VERBS[type(action)](desk, action)
