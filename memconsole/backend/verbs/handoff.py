"""``handoff run|rehearse``: every guest into another kernel, or through all of it but the jump."""

from __future__ import annotations

from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend.desk import Desk
from memconsole.backend.verbs.work import Work


def run(desk: Desk, action: HandoffRun) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.run(desk, action)


def rehearse(desk: Desk, action: HandoffRehearse) -> Work:
    """See :mod:`memconsole.backend.handoff.sequence`."""
    from memconsole.backend.handoff import sequence

    return sequence.rehearse(desk, action)
