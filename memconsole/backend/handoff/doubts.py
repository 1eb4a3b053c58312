"""Conditions of a handoff for what is in doubt before it begins: it would make for good what may still be put right.

Each is called by the finding that says it. A jump is refused by name; a rehearsal, which ends nothing, shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from memconsole.backend.handoff.facts import HandoffFacts
from memconsole.model import Condition, Severity

DOUBTS = {
    "custody-gone": ("custody answers", "memory that custody does not hold is lost at the jump"),
    "custody-lost": ("custody holds all that it was given", "what custody lost is not carried"),
    "custody-other": ("custody holds the memory that the ledger names", "a region is carried with other contents"),
    "custody-unknown": ("this memconsole can read all that custody holds", "what it cannot read is lost at the jump"),
    "region-truncated": ("every region has the size it was made with", "what was cut off is lost for good"),
    "region-torn": ("custody holds every segment of a region", "what is left of the region is lost at the jump"),
    "ledger-corrupt": ("the ledger is whole", "what the lost records meant is not carried"),
    "guest-between": (
        "no guest is on its way between two QEMUs",
        "its RAM and state end with this kernel",
    ),
    "handoff-guest-held": ("no guest waits since the last handoff", "the next one drops the guest's saved state"),
}
"""What is required where a finding says the opposite, and what a jump does to it."""

NO_MEMORY = frozenset(
    {"aside-plan", "board", "group", "halted", "iommu", "iova", "mount", "mount-unread", "report", "uffd", "vfio"}
)
"""Kinds of what custody holds that are no memory: one that cannot be read is told of, and loses nothing."""


def memory_doubts(facts: HandoffFacts) -> Iterator[Condition]:
    """The regions' memory, and custody of it."""
    severity = Severity.ERROR if facts.jump else Severity.WARNING
    yield Condition(
        "region-lost",
        severity,
        not facts.lost,
        requirement="custody holds the memory of every region",
        risk="memory that custody does not hold is lost at the jump",
        observed=f"custody lacks the memory of {', '.join(facts.lost)}" if facts.lost else "",
        remedy="memconsole audit says what can still be kept of each; one that is gone for good:"
        " memconsole release REGION",
    )
    for id, (requirement, risk) in DOUBTS.items():
        found = [each for each in facts.doubts if each.id == id and each.subject.partition(":")[0] not in NO_MEMORY]
        observed = "; ".join(f"{each.observed} ({each.evidence})" for each in found)
        remedies = "; ".join(dict.fromkeys(each.remedy for each in found if each.remedy))
        drops = id == "handoff-guest-held"  # a rehearsal does, too
        worst = Severity.ERROR if drops else severity
        yield Condition(id, worst, not found, requirement, risk, observed, remedies or "memconsole audit says more")


def store_doubts(facts: HandoffFacts) -> Iterator[Condition]:
    """What the service manager holds for others: the jump passes it by."""
    units = ", ".join(f"{store.unit} ({store.held})" for store in facts.stores)
    held = f"the service manager's fd store has descriptors of {units}" if units else ""
    yield Condition(
        "fdstore-left",
        Severity.WARNING,
        not units and not facts.stores_why,
        requirement="no other unit has descriptors in the service manager's fd store",
        risk="this jump loses them (an ordinary kexec of systemd 261 and newer carries them, and ends the guests)",
        observed=held or facts.stores_why,
        remedy="stop those units, or have them write down what they need, before the jump",
    )
