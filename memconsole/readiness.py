"""Whether a host is ready to hand its guests on, in words: one verdict for console, command line and metrics."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable

from memconsole import unforeseen
from memconsole.actions import HandoffRun
from memconsole.errors import MemconsoleError
from memconsole.model import Condition, HandoffReport, Plan, Readiness, Snapshot
from memconsole.units import format_age, format_duration

_SECOND = 1_000_000_000


class Verdict(enum.StrEnum):
    """``ready``: no condition refuses a handoff; ``refused``: one does; ``unknown``: none was judged."""

    READY = "ready"
    REFUSED = "refused"
    UNKNOWN = "unknown"


def judge(plan: Callable[[HandoffRun], Plan]) -> Readiness:
    """Judge every condition by the plan of a handoff; why that fails is told as trouble, never as an answer."""
    began, began_ns = time.monotonic_ns(), time.time_ns()
    made = unforeseen.attempt("whether a handoff could be made", "job", lambda: plan(HandoffRun()))
    took_ns = time.monotonic_ns() - began
    if isinstance(made, MemconsoleError):
        return Readiness(began_ns, took_ns, trouble=str(made))
    failing = [each for each in made.conditions if not each.ok]
    failing.sort(key=lambda each: not each.refuses)
    trouble = made.refusals[0].what if made.refusals and not made.conditions else ""
    return Readiness(began_ns, took_ns, tuple(failing), len(made.conditions), trouble)


def verdict(found: Readiness | None) -> Verdict:
    """What the last check comes to; what was never looked at is unknown, and so is a check that judged nothing."""
    if found is None or found.trouble or not found.total:
        return Verdict.UNKNOWN
    return Verdict.REFUSED if refusing(found) else Verdict.READY


def refusing(found: Readiness) -> tuple[Condition, ...]:
    """The conditions that refuse a handoff."""
    return tuple(each for each in found.failing if each.refuses)


def sentence(found: Readiness | None) -> str:
    """The verdict with its first reason, and how many more there are."""
    if found is None:
        return "not known to be ready: the conditions of a handoff were not checked"
    if found.trouble or not found.total:
        return f"not known to be ready: {found.trouble or 'no condition was judged'}"
    stopping = refusing(found)
    warnings = len(found.failing) - len(stopping)
    warn = f"{warnings} warning{'s' if warnings != 1 else ''}" if warnings else ""
    if not stopping:
        return f"ready to hand off: none of {found.total} conditions refuses it" + (f", {warn}" if warn else "")
    first = stopping[0]
    more = ", ".join(filter(None, [f"{len(stopping) - 1} more" if len(stopping) > 1 else "", warn]))
    return f"not ready to hand off: {first.id}: {first.observed}" + (f" ({more})" if more else "")


def age(found: Readiness, now_ns: int) -> str:
    """How long ago the check was, in words."""
    since = now_ns - found.checked_ns
    return f"checked {format_age(since)} ago" if since >= _SECOND else "checked just now"


def last_handoff(made: HandoffReport | None, now_ns: int) -> str:
    """The last rehearsal or handoff with its longest blackout, and how old it is."""
    if made is None:
        return "never rehearsed"
    known = [guest.blackout_ns for guest in made.guests if guest.blackout_ns is not None]
    longest = f", longest blackout {format_duration(max(known))}" if known else ""
    name = {"run": "handoff", "rehearse": "rehearsal"}[made.kind]
    when = format_age(max(now_ns - made.began_ns, _SECOND))
    return f"last {name} {made.state}{longest}, {when} ago"


def line(snapshot: Snapshot) -> str:
    """The host, its verdict and its last handoff in one line."""
    found = snapshot.readiness
    parts = [sentence(found), *([age(found, snapshot.taken_ns)] if found is not None else [])]
    return f"{snapshot.host.name}: {'; '.join([*parts, last_handoff(snapshot.handoff, snapshot.taken_ns)])}"
