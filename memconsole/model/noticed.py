"""Findings, sources that were not read, events, capabilities of the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec.structs import force_setattr

from memconsole.finding_kinds import KINDS
from memconsole.model.base import Value
from memconsole.model.words import Severity


class Finding(Value, frozen=True):
    """A difference between what is required of a host and what was observed on it.

    ``evidence`` is where it was observed, ``risk`` what it leads to. Risk and requirement are those of its kind
    (:data:`~memconsole.finding_kinds.KINDS`) where it names none.
    """

    id: str
    severity: Severity
    subject: str
    observed: str
    evidence: str = ""
    remedy: str = ""
    risk: str = ""
    requirement: str = ""

    def __post_init__(self) -> None:
        kind = KINDS.get(self.id)
        if kind is not None and not self.risk and not self.requirement:
            force_setattr(self, "risk", kind.risk)
            force_setattr(self, "requirement", kind.requirement)


_WORST_FIRST = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


def worst_first(findings: Sequence[Finding]) -> Sequence[Finding]:
    """The findings by severity, errors first, else in the order they have; the same object where that is theirs."""
    made = tuple(sorted(findings, key=lambda finding: _WORST_FIRST[finding.severity]))
    return findings if all(is_ is was for is_, was in zip(made, findings, strict=True)) else made


class Unread(Value, frozen=True):
    """A source that could not be read: what is missing from this Snapshot, why, and what to do about it."""

    source: str
    why: str
    remedy: str = ""


class Event(Value, frozen=True):
    """Something that happened, in the order it did; ``peer`` is who asked."""

    seq: int
    at_ns: int
    kind: str
    subject: str
    text: str
    peer: str = ""


class Capability(Value, frozen=True):
    """One line of ``doctor``: something this host can do or cannot, why, and the remedy."""

    id: str
    title: str
    level: Literal["yes", "partly", "no"]
    why: str = ""
    remedy: str = ""
