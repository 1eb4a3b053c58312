"""Conditions of a handoff for the guests that others run: libvirt's, adopted or not, and any QEMU that was adopted.

An adopted guest of libvirt comes along unless something keeps it (:mod:`.adopted_facts`); a jump would end what does
not come along, so it refuses, by name, with what keeps each of them. A rehearsal leaves those as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memconsole.backend.handoff.hindrances import hindrances
from memconsole.model import Condition, Guest, GuestState, Severity

if TYPE_CHECKING:
    from memconsole.backend.handoff.facts import HandoffFacts

_RISK = "they end with this kernel, and what they have not written is lost"
_WITHOUT_MANAGER = "shut it down from inside, or migrate it"


def conditions(facts: HandoffFacts) -> Iterator[Condition]:
    """Those of guests that are adopted, of others that libvirt runs, and of what an adopted one left."""
    yield _carried(facts, Severity.ERROR, _RISK)
    managed = [guest for guest in facts.strangers if guest.managed is not None]
    yield Condition(
        "guest-managed",
        Severity.ERROR,
        not managed,
        requirement="every guest of libvirt is adopted",
        risk=_RISK,
        observed=f"guests of libvirt are not adopted: {'; '.join(map(_with_hindrances, managed))}" if managed else "",
        remedy=f"memconsole guest adopt --all; what cannot be adopted: {_ended(managed)}",
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


def staying(facts: HandoffFacts) -> Iterator[Condition]:
    """That of a rehearsal: adopted guests that it leaves as they are."""
    yield _carried(facts, Severity.WARNING, "the guest runs on as it is, and its handoff is not rehearsed")


def _carried(facts: HandoffFacts, severity: Severity, risk: str) -> Condition:
    kept = [met for met in facts.guests if met.guest.adopted and met.kept]
    named = "; ".join(f"{met.guest.name} ({'; '.join(met.kept)})" for met in kept)
    alive = [met.guest for met in kept if met.state is not GuestState.GONE]
    return Condition(
        "guest-adopted",
        severity,
        not kept,
        requirement="every adopted guest can be carried",
        risk=risk,
        observed=f"adopted guests cannot be carried: {named}" if kept else "",
        remedy=f"see what keeps each; or {_ended(alive)}"
        if alive or not kept
        else "the commands that are said of each",
    )


def _with_hindrances(guest: Guest) -> str:
    found = hindrances(guest.managed) if guest.managed is not None else []
    return f"{guest.name} ({'; '.join(found)})" if found else guest.name


def _ended(guests: list[Guest]) -> str:
    """What ends each of some guests without loss."""
    managed = [guest.managed for guest in guests if guest.managed is not None]
    words = [each.by_virsh("managedsave") for each in managed]
    words += [_WITHOUT_MANAGER] if len(managed) < len(guests) else []
    return "; ".join(words) or "shut it down, save it (virsh managedsave), or migrate it first"
