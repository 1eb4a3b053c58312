"""Conditions of a jump for the guests that others run: libvirt's, adopted or not, and any QEMU that was adopted.

A handoff does not carry them yet: it would end them. So it refuses, by name, with what keeps each of them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from memconsole.model import Condition, Guest, GuestState, Managed, Severity

if TYPE_CHECKING:
    from memconsole.backend.handoff.facts import HandoffFacts

_RISK = "a handoff does not carry such guests yet: they end with this kernel, and what they have not written is lost"
_WITHOUT_MANAGER = "shut it down from inside, or migrate it"


def conditions(facts: HandoffFacts) -> Iterator[Condition]:
    """Those of guests that are adopted, of others that libvirt runs, and of what an adopted one left."""
    adopted = [met.guest for met in facts.guests if met.guest.adopted and met.state is not GuestState.GONE]
    yield Condition(
        "guest-adopted",
        Severity.ERROR,
        not adopted,
        requirement="no adopted guest runs",
        risk=_RISK,
        observed=f"adopted guests run: {'; '.join(map(_with_hindrances, adopted))}" if adopted else "",
        remedy=_ended(adopted),
    )
    managed = [guest for guest in facts.strangers if guest.managed is not None]
    yield Condition(
        "guest-managed",
        Severity.ERROR,
        not managed,
        requirement="no guest of libvirt runs",
        risk=_RISK,
        observed=f"guests of libvirt run: {'; '.join(map(_with_hindrances, managed))}" if managed else "",
        remedy=_ended(managed),
    )
    yield Condition(
        "region-named",
        Severity.ERROR,
        not facts.named,
        requirement="no region is a file that has a name",
        risk="live update preserves no file that has a name: the handoff fails part-way, and is undone",
        observed=f"regions whose files have names: {', '.join(facts.named)}" if facts.named else "",
        remedy="memconsole copy REGION FILE keeps the contents; then take the names of the files away (unlink)",
    )


def hindrances(managed: Managed) -> list[str]:
    """What speaks against carrying a domain into another kernel, as libvirt has it written down, each in words."""
    found = []
    if managed.ram.huge_pages:
        found.append("hugetlb RAM")
    elif not managed.ram.shared:
        found.append("private RAM")
    if managed.ram.discard:
        found.append("<discard/>: QEMU empties its RAM when it ends in order")
    passed = (*managed.host_devices, *managed.mediated)
    found += [f"host devices {', '.join(passed)}"] if passed else []
    found += managed.helped
    found += [f"{managed.job} under way"] if managed.job else []
    found += [f"{', '.join(managed.block_jobs)} under way"] if managed.block_jobs else []
    return found


def _with_hindrances(guest: Guest) -> str:
    found = hindrances(guest.managed) if guest.managed is not None else []
    return f"{guest.name} ({'; '.join(found)})" if found else guest.name


def _ended(guests: list[Guest]) -> str:
    """What ends each of some guests without loss."""
    by_manager = [shlex.quote(guest.managed.name) for guest in guests if guest.managed is not None]
    words = [f"virsh managedsave {name}" for name in by_manager]
    words += [_WITHOUT_MANAGER] if len(by_manager) < len(guests) else []
    return "; ".join(words) or "shut it down, save it (virsh managedsave), or migrate it first"
