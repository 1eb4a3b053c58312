"""Conditions of a handoff about processes: who is told to save, and whose program starts cold all the same."""

from __future__ import annotations

from collections.abc import Iterator

from memconsole.backend.handoff import services as saving
from memconsole.backend.handoff.facts import HandoffFacts
from memconsole.model import Condition, GuestKind, GuestState, Severity


def services(facts: HandoffFacts) -> Iterator[Condition]:
    """Whether services come up warm, as far as their programs are known."""
    known = [(met.guest, saving.program_of(met.guest)) for met in facts.guests if met.state is GuestState.RUNNING]
    cold = [
        (guest, each) for guest, each in known if guest.kind is GuestKind.PROCESS and each is not None and each.cold
    ]
    yield Condition(
        "guest-cold",
        Severity.WARNING,
        not cold,
        requirement="every service comes up with its data",
        risk="it starts cold after the handoff: slow, or empty, until its data is there again",
        observed="; ".join(f"guest {guest.name} ({each.name}): {each.cold}" for guest, each in cold),
        remedy="; ".join(dict.fromkeys(f"{each.name}: {each.instead}" for _, each in cold)) or "nothing need be done",
    )


def untold(facts: HandoffFacts) -> Condition:
    """Who ends with this kernel, and is not told."""
    untold = [met for met in facts.guests if met.guest.kind is GuestKind.PROCESS and met.state is not GuestState.GONE]
    processes = [met.guest.name for met in untold if not saving.runs(met.guest, met.state)]
    return Condition(
        "guest-process",
        Severity.WARNING,
        not processes,
        requirement="every guest is a VM, or a service that can be told to save",
        risk="an ordinary process ends with this kernel, and is told nothing; its regions are carried",
        observed=f"guests that are not told: {', '.join(processes)}" if processes else "",
        remedy="have it told, and started again: memconsole guest attach NAME --pid PID --save-signal S"
        " (docs/databases.md); or have it save by hand, and attach it again after the jump",
    )
