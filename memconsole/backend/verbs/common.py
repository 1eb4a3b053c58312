"""Refusals that several verbs share."""

from __future__ import annotations

import re
import shlex

from memconsole.actions import NAME
from memconsole.backend import needs
from memconsole.backend.work import PreparedAction
from memconsole.model import Guest, GuestKind, Region


def free_name(work: PreparedAction, desk: needs.LedgerState, name: str, *, region: bool, guest: bool) -> None:
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
        work.refuse("NameTaken", f"there is a region {name} already", "names are unique", "choose another name")
    if guest and name in state.guests:
        work.refuse("NameTaken", f"there is a guest {name} already", "names are unique", "choose another name")


def known_region(work: PreparedAction, desk: needs.LedgerState, name: str) -> Region | None:
    """The region of this name, or a refusal."""
    region = desk.state.regions.get(name)
    if region is None:
        known = ", ".join(sorted(desk.state.regions)) or "none"
        work.refuse(
            "NoSuchRegion", f"there is no region {name}", f"regions: {known}", f"memconsole reserve {name} SIZE"
        )
    return region


def known_guest(work: PreparedAction, desk: needs.LiveGuests, name: str) -> Guest | None:
    """The guest of this name, or a refusal; one that runs here without us is not ours to touch."""
    guest = desk.state.guests.get(name)
    if guest is not None:
        return guest
    foreign = next((each for each in desk.foreign_guests() if each.name == name), None)
    if foreign is not None:
        who = _who(foreign)
        socket = "" if foreign.managed is not None else " --qmp PATH"
        work.refuse(
            "Foreign",
            f"{name} is not a guest of memconsole",
            f"{who} started it, and memconsole only observes it",
            f"memconsole guest adopt {shlex.quote(name)}{socket}",
        )
    else:
        known = ", ".join(sorted(desk.state.guests)) or "none"
        work.refuse("NoSuchGuest", f"there is no guest {name}", f"guests: {known}", f"memconsole guest start {name}")
    return None


def _who(guest: Guest) -> str:
    if guest.managed is None:
        return "another program"
    session = f"the session daemon of user {guest.managed.user} ({guest.managed.manager})"
    return guest.managed.manager if guest.managed.user is None else session


def refuse_adopted(work: PreparedAction, guest: Guest, what: str, remedy: str) -> bool:
    """Refuse what is not done to a guest that somebody else runs; whether it is one."""
    if guest.adopted:
        why = f"{_who(guest)} runs it; memconsole has its RAM in custody, and nothing else"
        work.refuse("Adopted", f"guest {guest.name} is not {what} by memconsole", why, remedy)
    return guest.adopted


def at_its_manager(guest: Guest, verb: str) -> str:
    """Where a guest that is adopted is paused, resumed or ended."""
    if guest.managed is None:
        return "do it where it was started"
    return guest.managed.by_virsh(verb)


def is_vm(guest: Guest) -> bool:
    """Whether a guest is a VM of ours: it ends with us, an attached process does not."""
    return guest.kind in {GuestKind.CANARY, GuestKind.QEMU}
