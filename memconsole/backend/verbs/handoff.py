"""``handoff run|rehearse``: every guest into another kernel, or through all of it but the jump."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from msgspec.structs import replace

from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend import needs
from memconsole.backend.handoff.facets import GuestClocks, Handover
from memconsole.backend.handoff.powers import HOST, Powers
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.work import PreparedAction
from memconsole.errors import NotFound
from memconsole.model import Guest, GuestState

if TYPE_CHECKING:
    from memconsole.backend.handoff import carried_back, sequence


def run(desk: sequence.HandoffDesk, action: HandoffRun) -> PreparedAction:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.run(desk, action)


def watch_clocks(desk: GuestClocks) -> None:
    """Look after the clocks of guests that run again since the last handoff, if there was one."""
    if desk.handoff is not None:
        from memconsole.backend.handoff import clocks as after

        after.begin_clocks(desk)


def restart_saved_guest(desk: Handover, guest: Guest, powers: Powers = HOST) -> PreparedAction:
    """``guest resume`` of one that did not come back from a handoff: ``again`` starts it from what was saved."""
    from memconsole.backend.handoff import restart_one

    work = PreparedAction(guest.name, f"guest {guest.name} runs")

    def do() -> None:
        back = restart_one.restart_saved_guest(desk, guest, powers)
        work.lasting = StateChange(guests=(replace(back, state=GuestState.PAUSED),))
        work.change = StateChange(guests=(back,))
        work.after = after

    def after() -> None:
        restart_one.drop_saved_state(desk, guest.name)
        finish_sessions(desk)
        watch_clocks(desk)

    work.step("again", f"start {guest.name} from the state that was saved before the handoff", do)
    work.step(
        "go-on", f"resume {guest.name}, its devices as they were", lambda: restart_one.resume_guest(desk, guest.name)
    )
    return work


def is_carried(desk: carried_back.Returning, guest: str) -> bool:
    """Whether an adopted guest was carried, or ended for a rehearsal, and libvirt has not started it again."""
    if f"carried:{guest}" not in desk.custody.names():
        return False
    from memconsole.backend.handoff import carried

    return carried.is_waiting(desk, guest)


def restart_carried(desk: carried_back.Returning, guest: Guest) -> PreparedAction:
    """``guest resume`` of such a guest."""
    from memconsole.backend.handoff import carried_back

    return carried_back.restart(desk, guest)


def discard_carried(desk: carried_back.Returning, guest: str) -> None:
    """Let go of what custody has of such a guest besides its RAM, if it has anything."""
    if f"carried:{guest}" in desk.custody.names():
        from memconsole.backend.handoff import carried, carried_back

        carried_back.forget(desk, guest, carried.note(desk, guest))


def discard_saved_guest(desk: needs.InCustody, guest: str) -> None:
    """Let go of what a guest saved and did not come back from, if it did, and of sessions nothing of which is left."""
    with contextlib.suppress(NotFound):
        desk.custody.drop(f"state:{guest}")
    finish_sessions(desk)


def finish_sessions(desk: needs.InCustody) -> None:
    """Close the sessions of the kernel before that were kept, once nothing that came in them is in custody."""
    from memconsole.backend.handoff.bootplan import INCOMING

    names = desk.custody.names()
    for name in names:
        if name.startswith(INCOMING):
            fd, payload = desk.custody.get(name)
            os.close(fd)
            if payload.endswith(b"\n") and not set(os.fsdecode(payload).splitlines()) & set(names):
                desk.custody.drop(name)


def is_saved(desk: Handover, guest: str) -> bool:
    """Whether a guest did not come back from a handoff, and can be tried again."""
    if f"state:{guest}" not in desk.custody.names():
        return False
    from memconsole.backend.handoff import restart_one

    return restart_one.is_saved(desk, guest)


def awaits_devices(desk: Handover, guest: str) -> bool:
    """Whether a guest is held after a handoff because devices of it are not back."""
    if not any(name.startswith("iova:") for name in desk.custody.names()):
        return False
    from memconsole.backend.handoff import restart_one

    return restart_one.awaits_devices(desk, guest)


def reattach_devices(desk: Handover, work: PreparedAction, guest: Guest) -> None:
    """The step before ``guest resume`` of one whose devices are not back."""
    from memconsole.backend.handoff import restart_one

    work.step(
        "devices",
        f"give {guest.name} its devices back",
        lambda: restart_one.reattach_devices(desk, guest.name),
    )


def rehearse(desk: sequence.HandoffDesk, action: HandoffRehearse) -> PreparedAction:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.rehearse(desk, action)
