"""What custody keeps of a handoff from one control process to the next: its manifest, its report, saved states."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

import msgspec

from memconsole.backend.desk import Desk
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.handoff import manifest, report
from memconsole.backend.handoff.bootplan import MANIFEST
from memconsole.backend.handoff.manifest import Manifest
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.model import CarriedDevice, Finding, GuestKind, HandoffReport, HandoffState, Severity


def content(desk: Desk, name: str) -> bytes:
    """What a memfd in custody holds.

    Raises:
        NotFound: nothing in custody is called so.
    """
    fd, _ = desk.custody.get(name)
    try:
        return manifest.content(fd)
    finally:
        os.close(fd)


def described(desk: Desk) -> tuple[Manifest | None, list[Finding]]:
    """The manifest of the last handoff; None, and a finding, where there is none, or it is of another version."""
    try:
        return manifest.read(content(desk, MANIFEST)), []
    except (BadFile, NotFound) as error:
        what = f"the manifest of the handoff is not known: {error.why or error.what}"
        return None, [Finding("manifest-unknown", Severity.WARNING, MANIFEST, what, "custody", error.remedy)]


def saved(desk: Desk) -> list[str]:
    """The guests whose state is in custody, of those the ledger knows."""
    return [name for name in desk.state.guests if f"state:{name}" in desk.custody.names()]


def store(desk: Desk, made: HandoffReport) -> None:
    """Show a report, and keep it in custody for the next control process."""
    desk.handoff = made
    fd = manifest.memfd("memconsole-report", msgspec.json.encode(made))
    try:
        desk.custody.put(report.CUSTODY, fd)
    finally:
        os.close(fd)


def stored(desk: Desk) -> HandoffReport | None:
    """The report of the last handoff, as custody holds it."""
    if report.CUSTODY not in desk.custody.names():
        return None
    with contextlib.suppress(msgspec.DecodeError, NotFound):
        return msgspec.json.decode(content(desk, report.CUSTODY).rstrip(b"\0"), type=HandoffReport)
    return None


def reported(desk: Desk) -> HandoffReport | None:
    """The report, with what guests say of their own blackout; asked until they have said it."""
    made = desk.handoff
    if made is None or made.state is not HandoffState.DONE:
        return made
    waiting = [guest for guest in made.guests if guest.back and guest.kind is GuestKind.CANARY and guest.by != "guest"]
    said = []
    for guest in waiting:
        live = desk.live(guest.name)
        with contextlib.suppress(MemconsoleError):
            if isinstance(live, CanaryGuest) and live.agent():
                restored, blackout_ns = live.blackout()
                if restored and blackout_ns:
                    said.append((guest.name, blackout_ns))
    if said:
        made = report.filled(made, said)
        store(desk, made)
    return made


def newest(before: Iterable[CarriedDevice], now: Iterable[CarriedDevice]) -> tuple[CarriedDevice, ...]:
    """The devices of a report, those that were looked at again as they are now."""
    found = {each.bdf: each for each in before}
    return tuple((found | {each.bdf: each for each in now}).values())
