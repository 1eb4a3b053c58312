"""What a Snapshot says of us beside the survey: of custody, the mount, devices, handoffs, and guests that wait.

A host where none of these is costs nothing: their rooms are entered only where there is something.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from memconsole.backend.kernel import tree
from memconsole.errors import Gone
from memconsole.model import Finding, HandoffReport, Severity

if TYPE_CHECKING:
    from memconsole.backend.desk import Desk


def findings(desk: Desk) -> tuple[Finding, ...]:
    """What is not as it should be, or worth knowing, of what we hold."""
    return (
        *_custody(desk),
        *(desk.mount.findings() if desk.mount is not None else ()),
        *_devices(desk),
        *_waiting(desk),
    )


def handed_off(desk: Desk) -> HandoffReport | None:
    """The report of the last handoff, with what the guests say of their blackout as soon as they do."""
    if desk.handoff is None:
        return None
    from memconsole.backend.handoff import kept

    return kept.reported(desk)


def sessions(desk: Desk) -> tuple[str, ...]:
    """The sessions of live update that are in custody."""
    if desk.custody.survives and tree.exists(desk.root, "/dev/liveupdate"):
        with contextlib.suppress(Gone):
            return tuple(name for name in desk.custody.names() if name.startswith(("session:", "incoming:")))
    return ()


def _custody(desk: Desk) -> tuple[Finding, ...]:
    """That what holds the memory is no more, and so does not outlive this process; or that another does by now."""
    try:
        desk.custody.check()
    except Gone as error:
        what = f"nobody but this process holds the regions: {error.what}"
        remedy = "do not restart it before what matters was copied out of the regions that no guest maps"
        return (Finding("custody-gone", Severity.ERROR, "custody", what, error.why, remedy),)
    remedy = "look who killed it: only root can"
    return tuple(
        Finding("custody-replaced", Severity.WARNING, "custody", what, "custody", remedy)
        for what in desk.custody.troubles()
    )


def _devices(desk: Desk) -> tuple[Finding, ...]:
    """Where devices reach other memory than the ledger grants them, or a kexec would keep."""
    if not (
        desk.hands_devices
        or any(grant.dma is not None for grant in desk.state.grants.values())
        or tree.exists(desk.root, "/sys/bus/pci/drivers/vfio-pci")
    ):
        return ()
    from memconsole.backend.dma import check

    return check.check(desk)


def _waiting(desk: Desk) -> tuple[Finding, ...]:
    """The guests that gave their RAM back by ending, and those that a handoff left in custody."""
    if not desk.state.guests:
        return ()
    from memconsole.backend.revoke import aside
    from memconsole.backend.verbs import handoff

    with contextlib.suppress(Gone):  # that nobody has custody any more is a finding of its own
        return (*aside.findings(desk), *handoff.held(desk))
    return ()
