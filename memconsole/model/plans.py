"""What an Action would do, and what it did."""

from __future__ import annotations

import enum

from memconsole.model.base import Value
from memconsole.model.handoff import Condition
from memconsole.model.words import RevokeOutcome, Rung


class Effect(Value, frozen=True):
    """One step of a plan: its id (also its fault point), what it does, and how it is undone."""

    id: str
    text: str
    undo: str = ""


class Refusal(Value, frozen=True):
    """Why a plan cannot be applied: a named condition and its remedy."""

    code: str
    what: str
    why: str = ""
    remedy: str = ""


class Danger(enum.StrEnum):
    """``changes`` can be undone; ``destroys`` wants a typed name."""

    CHANGES = "changes"
    DESTROYS = "destroys"


class Plan(Value, frozen=True):
    """What an Action would do, in order, and why it would not; ``confirm`` is the name to type, if any.

    A handoff's plan lists its ``conditions``: those that fail, and those that hold. ``subject`` is what it works on, or
    would make (a grant's id); ``note`` is what it takes for granted. ``from_kernel`` and ``to_kernel`` of a handoff:
    the kernel that runs and the one that would be booted, by release and version; the same where it runs already, and
    empty where that could not be read.
    """

    action: str
    cli: str
    danger: Danger
    effects: tuple[Effect, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    confirm: str | None = None
    conditions: tuple[Condition, ...] = ()
    subject: str = ""
    note: str = ""
    from_kernel: str = ""
    to_kernel: str = ""


class RevokeReport(Value, frozen=True):
    """How a revoke ended: the rung it needed, how long it took, and how strong its end is."""

    grant: str
    rung: Rung
    outcome: RevokeOutcome
    took_ns: int
    tried: tuple[Rung, ...] = ()
    note: str = ""


class Outcome(Value, frozen=True):
    """What an applied Action did: the effects in order, the entity it made (``grant`` id, region name), its time."""

    action: str
    subject: str
    text: str
    effects: tuple[Effect, ...] = ()
    took_ns: int = 0
    revoke: RevokeReport | None = None
