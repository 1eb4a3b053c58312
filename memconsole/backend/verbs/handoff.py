"""``handoff run|rehearse``: every guest into another kernel, or through all of it but the jump."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from msgspec.structs import replace

from memconsole.actions import Handoff, HandoffRehearse, HandoffRun
from memconsole.backend.desk import Desk
from memconsole.backend.state import Change
from memconsole.backend.verbs.work import Work
from memconsole.errors import NotFound
from memconsole.model import Finding, Guest, GuestState, Severity


def run(desk: Desk, action: HandoffRun) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.run(desk, action)


def again(desk: Desk, guest: Guest) -> Work:
    """``guest resume`` of one that did not come back from a handoff: ``again`` starts it from what was saved."""
    from memconsole.backend.handoff import alone

    work = Work(guest.name, f"guest {guest.name} goes on")

    def do() -> None:
        back = alone.again(desk, guest)
        work.lasting = Change(guests=(replace(back, state=GuestState.PAUSED),))
        work.change = Change(guests=(back,))
        work.after = after

    def after() -> None:
        alone.let_go(desk, guest.name)
        tidy(desk)

    work.step("again", f"start {guest.name} from what was saved before the handoff", do)
    work.step("go-on", f"let {guest.name} go on, its devices as they were", lambda: alone.go_on(desk, guest.name))
    return work


def held(desk: Desk) -> Iterator[Finding]:
    """The guests that did not come back from a handoff, each with why; what they are is in custody."""
    state = desk.state
    if any(isinstance(intent.action, Handoff) for intent in state.unfinished.values()):
        return
    whys = {each.name: each.why for each in desk.handoff.guests} if desk.handoff is not None else {}
    for name in desk.custody.names():
        guest = name.removeprefix("state:")
        if guest != name and guest in state.guests and desk.live(guest) is None:
            what = f"guest {guest} did not come back from a handoff: {whys.get(guest) or 'nobody started it'}"
            remedy = f"memconsole guest resume {guest} tries again; memconsole guest stop {guest} gives it up"
            yield Finding("handoff-guest-held", Severity.ERROR, guest, what, "custody", remedy)


def give_up(desk: Desk, guest: str) -> None:
    """Let go of what a guest saved and did not come back from, if it did, and of sessions nothing of which is left."""
    with contextlib.suppress(NotFound):
        desk.custody.drop(f"state:{guest}")
    tidy(desk)


def tidy(desk: Desk) -> None:
    """Close the sessions of the kernel before that were kept, once nothing that came in them is in custody."""
    from memconsole.backend.handoff.bootplan import INCOMING

    names = desk.custody.names()
    for name in names:
        if name.startswith(INCOMING):
            fd, payload = desk.custody.get(name)
            os.close(fd)
            if payload.endswith(b"\n") and not set(os.fsdecode(payload).splitlines()) & set(names):
                desk.custody.drop(name)


def waits(desk: Desk, guest: str) -> bool:
    """Whether a guest did not come back from a handoff, and can be tried again."""
    if f"state:{guest}" not in desk.custody.names():
        return False
    from memconsole.backend.handoff import alone

    return alone.waits(desk, guest)


def devices_wait(desk: Desk, guest: str) -> bool:
    """Whether a guest is held after a handoff because devices of it are not back."""
    if not any(name.startswith("iova:") for name in desk.custody.names()):
        return False
    from memconsole.backend.handoff import alone

    return alone.devices_wait(desk, guest)


def give_back(desk: Desk, work: Work, guest: Guest) -> None:
    """The step before ``guest resume`` of one whose devices are not back."""
    from memconsole.backend.handoff import alone

    work.step("devices", f"give {guest.name} its devices back as they were", lambda: alone.give_back(desk, guest.name))


def rehearse(desk: Desk, action: HandoffRehearse) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.rehearse(desk, action)
