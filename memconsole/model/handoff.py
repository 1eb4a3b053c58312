"""Conditions and reports of a handoff."""

from __future__ import annotations

import enum
from typing import Literal

from memconsole.model.base import Value
from memconsole.model.words import GuestKind, Severity


class Condition(Value, frozen=True):
    """One way to lose memory, or to make the blackout long, and whether this host is free of it.

    An ``error`` that is not ``ok`` refuses the handoff, a ``warning`` is worth reading before it. ``requirement`` is
    what should be, ``risk`` what it leads to where it is not, ``observed`` what was found, a whole sentence where the
    condition does not hold.
    """

    id: str
    severity: Severity
    ok: bool
    requirement: str
    risk: str
    observed: str
    remedy: str

    @property
    def refuses(self) -> bool:
        """Whether it refuses the handoff."""
        return not self.ok and self.severity is Severity.ERROR


class HandoffState(enum.StrEnum):
    """``running``: under way; ``done``; ``failed``: undone, every guest runs where it was."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Phase(Value, frozen=True):
    """One phase of a handoff, ns since it began; ``end_ns`` is None while it lasts."""

    id: str
    text: str
    start_ns: int
    end_ns: int | None = None
    blackout: bool = False


class GuestClock(Value, frozen=True):
    """A guest's wall clock after a handoff, which counted on from where it stood: ns it is late, as its agent said.

    ``was_ns`` before the agent was asked to set it, ``late_ns`` afterwards; None: nobody could ask, it is late by the
    blackout until something in the guest sets it. ``note``: what came of it; ``sources``: the clocks of a virtual
    machine that it has (``kvmclock``, ``vmclock``).
    """

    was_ns: int | None = None
    late_ns: int | None = None
    note: str = ""
    sources: tuple[str, ...] = ()


class GuestResult(Value, frozen=True):
    """A guest of a handoff: whether it came back, and how long it stood still (``by`` its own count, or the VMM's).

    ``lane``: which way an adopted guest goes, and why that way.
    """

    name: str
    kind: GuestKind
    memory: int
    back: bool = False
    pid: int | None = None
    blackout_ns: int | None = None
    by: str = ""
    why: str = ""
    clock: GuestClock | None = None
    lane: str = ""


class RegionResult(Value, frozen=True):
    """A region of a handoff: ``same``: its pages are where they were; ``contents``: what is in them is what was."""

    name: str
    size: int
    runs: int
    preserve_ns: int = 0
    verify_ns: int = 0
    same: bool | None = None
    contents: bool | None = None


class DeviceResult(Value, frozen=True):
    """A device of a handoff; ``pages`` and ``runs`` of its IOVA table, as ``source`` (kernel, ledger) said.

    ``how`` it came along: ``rebuilt``, ``preserved`` by the kernel, or ``kept`` in custody (a rehearsal); ``why`` it
    had to be rebuilt, or is not back. ``same``: each IOVA leads to the frame it led to. ns since the handoff began.
    """

    bdf: str
    guest: str
    pages: int
    runs: int
    source: str
    how: str
    quiesced_ns: int | None = None
    back_ns: int | None = None
    same: bool | None = None
    why: str = ""


class WindowResult(Value, frozen=True):
    """A window of a handoff: whether its guest mapped it again."""

    window: str
    guest: str
    grant: str
    back: bool = False
    why: str = ""


class HandoffReport(Value, frozen=True):
    """The last handoff, or the one under way; the phases of ``blackout`` are those in which guests stand still."""

    kind: Literal["run", "rehearse"]
    state: HandoffState
    began_ns: int
    from_kernel: str = ""
    to_kernel: str = ""
    phases: tuple[Phase, ...] = ()
    guests: tuple[GuestResult, ...] = ()
    regions: tuple[RegionResult, ...] = ()
    devices: tuple[DeviceResult, ...] = ()
    windows: tuple[WindowResult, ...] = ()
    why: str = ""
    notes: tuple[str, ...] = ()


class Readiness(Value, frozen=True):
    """Whether a handoff would be refused, as the control process found by itself when something it depends on changed.

    ``checked_ns`` is when, ns since the epoch; ``failing`` of ``total`` conditions did not hold, those that refuse
    first; ``trouble`` is why they could not be judged. Source: the plan of ``handoff run``.
    """

    checked_ns: int
    took_ns: int = 0
    failing: tuple[Condition, ...] = ()
    total: int = 0
    trouble: str = ""
