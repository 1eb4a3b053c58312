"""Refusals that several verbs share."""

from __future__ import annotations

import re

from memconsole.actions import NAME
from memconsole.backend.desk import Desk
from memconsole.backend.verbs.work import Work
from memconsole.model import Guest, GuestKind, Region, RegionState


def free_name(work: Work, desk: Desk, name: str, *, region: bool, guest: bool) -> None:
    """Refuse a name that is none, or that a region or guest has already."""
    state = desk.state
    if not re.fullmatch(NAME, name):
        work.refuse(
            "BadName",
            f"{name!r} cannot be a name",
            "a name is 1 to 55 letters, digits, dots, dashes and underscores, and begins with a letter or digit",
            "choose another name",
        )
    if region and name in state.regions:
        work.refuse("NameTaken", f"there is a region {name} already", "", f"choose another name, or release {name}")
    if guest and name in state.guests:
        work.refuse("NameTaken", f"there is a guest {name} already", "", f"choose another name, or stop guest {name}")


def known_region(work: Work, desk: Desk, name: str) -> Region | None:
    """The region of this name, or a refusal."""
    region = desk.state.regions.get(name)
    if region is None:
        known = ", ".join(sorted(desk.state.regions)) or "none"
        work.refuse(
            "NoSuchRegion", f"there is no region {name}", f"regions: {known}", f"memconsole reserve {name} SIZE"
        )
    return region


def known_guest(work: Work, desk: Desk, name: str) -> Guest | None:
    """The guest of this name, or a refusal; one that runs here without us is not ours to touch."""
    guest = desk.state.guests.get(name)
    if guest is not None:
        return guest
    pid = name.rpartition("-")[2]
    if pid.isdecimal() and any(each.name == name for each in desk.foreign()):
        work.refuse(
            "Foreign",
            f"{name} is not a guest of memconsole",
            "it was started by somebody else, and is only looked at",
            f"memconsole guest attach NAME --pid {pid}",
        )
    else:
        known = ", ".join(sorted(desk.state.guests)) or "none"
        work.refuse("NoSuchGuest", f"there is no guest {name}", f"guests: {known}", f"memconsole guest start {name}")
    return None


def not_frozen(work: Work, region: Region, what: str) -> None:
    """Refuse to change a region that is frozen, or preserved for a kexec."""
    if region.state in {RegionState.FROZEN, RegionState.PRESERVED}:
        work.refuse(
            "Frozen",
            f"region {region.name} is {region.state} and cannot be {what}",
            "its memory must not change until the handoff is over",
            "finish or abort the handoff",
        )


def is_vm(guest: Guest) -> bool:
    """Whether a guest is a VM of ours: it ends with us, an attached process does not."""
    return guest.kind in {GuestKind.CANARY, GuestKind.QEMU}
