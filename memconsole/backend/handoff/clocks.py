"""The wall clocks of guests after a handoff: late by the blackout, and put right where the guest has QEMU's agent.

A guest's clock counts on from where it stood. Nothing tells it the time but what runs in it: its agent, by
``guest-set-time``, or its own NTP. That is after the resume and outside the blackout, in threads that nobody waits for;
the report says what came of it as soon as it is known, and a control process that dies meanwhile leaves it to the next.
"""

from __future__ import annotations

import contextlib
import time
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from msgspec.structs import replace

from memconsole import unforeseen
from memconsole.backend import steplog
from memconsole.backend.guests.base import is_qemu
from memconsole.backend.guests.guestagent import Channel
from memconsole.backend.handoff import stored
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import GuestClock, GuestKind, GuestResult, GuestState, HandoffReport, HandoffState

if TYPE_CHECKING:
    from pathlib import Path

    from memconsole.backend import needs
    from memconsole.backend.guests.base import Qemu
    from memconsole.backend.handoff.facets import GuestClocks

ANSWERS_S = 10.0
"""Seconds a guest's agent has for all that it is asked."""
COMES_S = 60.0
"""Seconds a guest's monitor has until it answers: a guest is looked after once, and not on the way of anybody."""
_AT_ONCE = 16
_CANARY = GuestClock(note="it has no wall clock; it counts gaps in its own time")


def begin_clocks(desk: GuestClocks) -> None:
    """Look after the clocks of those guests of the last handoff that are back and were not looked after yet."""
    made = desk.handoff
    if made is None or made.state is not HandoffState.DONE:
        return
    waiting = [guest for guest in made.guests if guest.back and guest.clock is None]
    if any(guest.kind is GuestKind.CANARY for guest in waiting):
        stored.amend_report(desk, _of_canaries)
    waiting = [guest for guest in waiting if guest.kind is GuestKind.QEMU]
    left = SimpleQueue[GuestResult]()
    for guest in waiting:
        left.put(guest)
    for _ in range(min(_AT_ONCE, len(waiting))):
        unforeseen.thread("memconsole-clocks", partial(_run, desk, made.began_ns, left)).start()


def _run(desk: GuestClocks, began_ns: int, left: SimpleQueue[GuestResult]) -> None:
    with contextlib.suppress(Empty):
        while True:
            guest = left.get_nowait()
            clock = set_clock(desk, guest)
            if clock is not None:
                # custody may be closed by now: the next control process looks again
                with steplog.suppressed(f"the clock of {guest.name} is noted", MemconsoleError, OSError):
                    stored.amend_report(desk, partial(with_clock, began_ns=began_ns, name=guest.name, clock=clock))


def with_clock(made: HandoffReport, *, began_ns: int, name: str, clock: GuestClock) -> HandoffReport:
    """A report with what is known of a guest's clock; another handoff's report as it is, and the first word counts."""
    if made.began_ns != began_ns:
        return made
    guests = tuple(
        replace(guest, clock=clock) if guest.name == name and guest.clock is None else guest for guest in made.guests
    )
    return replace(made, guests=guests)


def _of_canaries(made: HandoffReport) -> HandoffReport:
    guests = tuple(
        replace(guest, clock=_CANARY) if guest.back and guest.kind is GuestKind.CANARY else guest
        for guest in made.guests
    )
    return replace(made, guests=guests)


def set_clock(desk: needs.LiveGuests, guest: GuestResult) -> GuestClock | None:
    """A QEMU guest's clock, put right if it can be; None while it does not run, or once the desk has let go of it.

    Then it is looked after later, perhaps by the next control process.
    """
    live = desk.live_guest(guest.name)
    if not is_qemu(live):
        return None
    try:
        if not _runs(live):
            return None
        path, sources = live.agent_channel(), _sources(live)
    except MemconsoleError as error:
        if desk.live_guest(guest.name) is not live:
            return None
        return GuestClock(note=f"its clock cannot be read: {error.why or error.what}")
    if path is None:
        return GuestClock(sources=sources, note="it has no channel for QEMU's guest agent")
    try:
        return replace(_set_by_agent(guest.name, path), sources=sources)
    except GuestError as error:
        return GuestClock(sources=sources, note=_error_text(error))


def _runs(live: Qemu) -> bool:
    """Whether it runs; one that has just been started on a busy host is given time to say so.

    Raises:
        Gone: it ended. GuestError: it does not answer.
    """
    deadline = time.monotonic() + COMES_S
    while True:
        try:
            return live.state() is GuestState.RUNNING
        except GuestError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _sources(live: Qemu) -> tuple[str, ...]:
    # nothing that is worth not setting its clock for
    with steplog.suppressed(f"{live.name} says which clocks it has", MemconsoleError):
        return live.clocks()
    return ()


def _error_text(error: GuestError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what


def _set_by_agent(guest: str, path: Path) -> GuestClock:
    with Channel(guest, path, ANSWERS_S) as agent:
        was = _lateness(agent)
        answer = "its agent set the clock"
        try:
            agent.set_time(time.time_ns())
        except GuestError as error:  # it may have set the one and not the other
            answer = _error_text(error)
        return GuestClock(was_ns=was, late_ns=_lateness(agent), note=answer)


def _lateness(agent: Channel) -> int:
    """How late a guest's clock is, ns; negative: it is ahead."""
    before = time.time_ns()
    told = agent.time()
    return (before + time.time_ns()) // 2 - told
