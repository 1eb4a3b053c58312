"""``handoff run|rehearse``: every guest into another kernel, or through all of it but the jump."""

from __future__ import annotations

from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend.desk import Desk
from memconsole.backend.state import Change
from memconsole.backend.verbs.work import Work
from memconsole.model import Guest


def run(desk: Desk, action: HandoffRun) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.run(desk, action)


def again(desk: Desk, guest: Guest) -> Work:
    """``guest resume`` of one that did not come back from a handoff: ``again`` starts it from what was saved."""
    from memconsole.backend.handoff import adopt

    work = Work(guest.name, f"guest {guest.name} goes on")

    def do() -> None:
        work.change = Change(guests=(adopt.again(desk, guest),))

    work.step("again", f"start {guest.name} from what was saved before the handoff", do)
    return work


def waits(desk: Desk, guest: str) -> bool:
    """Whether a guest did not come back from a handoff, and can be tried again."""
    if f"state:{guest}" not in desk.custody.names():
        return False
    from memconsole.backend.handoff import adopt

    return adopt.waits(desk, guest)


def devices_wait(desk: Desk, guest: str) -> bool:
    """Whether a guest is held after a handoff because devices of it are not back."""
    if not any(name.startswith("iova:") for name in desk.custody.names()):
        return False
    from memconsole.backend.handoff import adopt

    return adopt.devices_wait(desk, guest)


def give_back(desk: Desk, work: Work, guest: Guest) -> None:
    """The step before ``guest resume`` of one whose devices are not back."""
    from memconsole.backend.handoff import adopt

    work.step("devices", f"give {guest.name} its devices back as they were", lambda: adopt.give_back(desk, guest.name))


def rehearse(desk: Desk, action: HandoffRehearse) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.rehearse(desk, action)
