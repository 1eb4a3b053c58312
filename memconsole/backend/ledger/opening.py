"""What a control process begins with: the ledger in custody, the boot it means, and the audit trail beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from memconsole.backend.custody.names import LANDED
from memconsole.backend.kernel import kho, tree
from memconsole.backend.ledger.log import Ledger
from memconsole.backend.ledger.state import State

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.ledger.trail import AuditTrail

LEDGER = "ledger"
"""What the ledger is called in custody."""


def in_custody(custody: Custody, root: Path) -> Ledger:
    """The ledger in custody, or a new one put there."""
    if LEDGER in custody.names():
        fd, _ = custody.get(LEDGER)
        try:
            return Ledger.open(fd)
        except BaseException:
            os.close(fd)
            raise
    ledger = Ledger.create(tree.line(root, "/proc/sys/kernel/random/boot_id"))
    try:
        custody.put(LEDGER, ledger.fd)
    except BaseException:
        ledger.close()
        raise
    return ledger


def boot_of(state: State, ledger: Ledger, custody: Custody) -> str:
    """The boot the ledger means; one without a word of it (of an older memconsole) means that of its last landing."""
    if state.boot:
        return state.boot
    return "" if LANDED in custody.names() else ledger.chain


def trail(state_dir: Path, ledger: Ledger, root: Path) -> AuditTrail:
    """The audit trail, with what it lacks of the ledger."""
    from memconsole.backend.ledger.trail import AuditTrail

    boot_id, survival = tree.line(root, "/proc/sys/kernel/random/boot_id"), kho.survival(root)
    audit = AuditTrail(state_dir / "audit.sqlite", ledger.chain, boot_id, survival.kexec_count)
    try:
        audit.absorb(ledger.records())
    except BaseException:
        audit.close()
        raise
    return audit
