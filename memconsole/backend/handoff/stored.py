"""What custody keeps of a handoff from one control process to the next: its manifest, its report, saved states."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable

from memconsole import newer
from memconsole.backend import needs, steplog
from memconsole.backend.custody import payloads
from memconsole.backend.guests.base import is_canary
from memconsole.backend.handoff import manifest, report
from memconsole.backend.handoff.bootplan import MANIFEST
from memconsole.backend.handoff.facets import HandoffReporting, SavedStates
from memconsole.backend.handoff.manifest import Manifest
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.model import DeviceResult, Finding, GuestKind, HandoffReport, HandoffState, Severity

_writing = threading.Lock()


def stored_content(desk: needs.InCustody, name: str) -> bytes:
    """What a memfd in custody holds.

    Raises:
        NotFound: nothing in custody is called so.
    """
    fd, _ = desk.custody.get(name)
    try:
        return manifest.content(fd)
    finally:
        os.close(fd)


def stored_manifest(desk: needs.InCustody) -> tuple[Manifest | None, list[Finding]]:
    """The manifest of the last handoff; None, and a finding, where there is none, or it is of another version."""
    try:
        return manifest.read(stored_content(desk, MANIFEST)), []
    except (BadFile, NotFound) as error:
        what = f"the manifest of the handoff cannot be read: {error.why or error.what}"
        return None, [Finding("manifest-unknown", Severity.WARNING, MANIFEST, what, "custody", error.remedy)]


def saved_guests(desk: SavedStates) -> list[str]:
    """The guests whose state is in custody, of those the ledger knows."""
    return [name for name in desk.state.guests if f"state:{name}" in desk.custody.names()]


def store_report(desk: HandoffReporting, made: HandoffReport) -> None:
    """Show a report, and keep it in custody for the next control process."""
    desk.handoff, left = made, None
    with contextlib.suppress(BadFile, NotFound):
        raw = stored_content(desk, report.CUSTODY).rstrip(b"\0")
        before = payloads.read(report.CUSTODY, raw, HandoffReport)
        left = newer.rest(raw, before) if before.began_ns == made.began_ns else None
    fd = manifest.memfd("memconsole-report", newer.encode(made, left))
    try:
        desk.custody.put(report.CUSTODY, fd)
    finally:
        os.close(fd)


def stored_report(desk: needs.InCustody) -> HandoffReport | None:
    """The report of the last handoff, as custody holds it.

    Raises:
        BadFile: this memconsole cannot read it.
    """
    if report.CUSTODY not in desk.custody.names():
        return None
    return payloads.read(report.CUSTODY, stored_content(desk, report.CUSTODY).rstrip(b"\0"), HandoffReport)


def with_guests_blackouts(desk: needs.LiveGuests, made: HandoffReport) -> HandoffReport:
    """A report with what guests say of their own blackout; those that have not said it yet are asked."""
    if made.state is not HandoffState.DONE:
        return made
    waiting = [guest for guest in made.guests if guest.back and guest.kind is GuestKind.CANARY and guest.by != "guest"]
    said = []
    for guest in waiting:
        live = desk.live_guest(guest.name)
        with steplog.suppressed(f"{guest.name} says how long it stood still", MemconsoleError):
            if is_canary(live) and live.agent():
                restored, blackout_ns = live.blackout()
                if restored and blackout_ns:
                    said.append((guest.name, blackout_ns))
    return report.with_blackouts(made, said)


def amend_report(desk: HandoffReporting, change: Callable[[HandoffReport], HandoffReport]) -> HandoffReport | None:
    """Change the report that is shown; one at a time does, for guests tell what they know in threads of their own."""
    with _writing:
        made = desk.handoff
        if made is not None and (changed := change(made)) != made:
            store_report(desk, changed)
        return desk.handoff


def newest_devices(before: Iterable[DeviceResult], now: Iterable[DeviceResult]) -> tuple[DeviceResult, ...]:
    """The devices of a report, those that were looked at again as they are now."""
    found = {each.bdf: each for each in before}
    return tuple((found | {each.bdf: each for each in now}).values())
