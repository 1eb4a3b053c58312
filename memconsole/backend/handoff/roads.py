"""By which road guests cross: live update carries memfds; what lies in an arena stays where it is, with or without it.

live update here, and both words on the next command line     the manifest and the guests' state go with it
else, and there is an arena                                   they are left in the arena that has the most room;
                                                              a region on a memfd is refused by its name
"""

from __future__ import annotations

from memconsole.backend.custody.names import MOUNT
from memconsole.backend.handoff import cargo, facets, gathered, services
from memconsole.backend.kernel import cmdline
from memconsole.backend.stores.base import Carrier
from memconsole.model import GuestKind, Survival

WORDS = ("kho", "liveupdate")
_STATES = {GuestKind.CANARY: 1 << 20, GuestKind.QEMU: 8 << 20}
"""Bytes that a guest's state may have besides its RAM, well above what was seen (a QEMU of one disk: 100 KiB)."""
_MANIFEST = 2 << 20


def facts_of(desk: facets.HandoffChecks, survival: Survival, line: str) -> dict[str, object]:
    """The fields ``road``, ``room`` and ``arenas`` of the facts of a jump."""
    words = cmdline.parse(line)
    carriers = [each for store in desk.stores.values() for each in store.carriers()]
    arenas = tuple((each.name, each.start) for each in carriers if each.start is not None)
    if not carriers or (survival.luo and all(cmdline.switched_on(words, name) for name in WORDS)):
        return {"arenas": arenas}
    most = max(carriers, key=lambda each: each.free)
    return {"arenas": arenas, "road": most.place, "room": (_needed(desk, most), most.free)}


def _needed(desk: facets.HandoffChecks, carrier: Carrier) -> int:
    held = set(desk.custody.names())
    told = [name for name in held if name.startswith(services.TOLD)]
    sizes = cargo.held_sizes(desk, [name for name in (gathered.LEDGER, MOUNT, *told) if name in held])
    sizes += [_STATES[guest.kind] for guest in desk.state.guests.values() if guest.kind in _STATES]
    return sum(-(-max(size, 1) // carrier.unit) * carrier.unit for size in (*sizes, _MANIFEST))


def stranded(desk: facets.HandoffChecks) -> tuple[tuple[str, str], ...]:
    """VMs that memconsole started, each with a region that it runs on and that memconsole-resume does not find."""
    state = desk.state
    return tuple(
        (guest.name, grant.region)
        for guest in state.guests.values()
        if guest.kind in _STATES
        for grant in state.grants_of(guest=guest.name)
        if desk.holds_region(grant.region)
        and not desk.store_of(grant.region).CARRIED
        and not cargo.place_of(desk, grant.region)
    )
