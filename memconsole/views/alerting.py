"""What is new among the findings: told once, and counted until it was looked at."""

from __future__ import annotations

from collections.abc import Sequence

from memconsole.fields import TABLES
from memconsole.model import Finding, Severity, Snapshot

AGAIN_NS = 60 * 1_000_000_000
"""How long a finding must have been away to be new again: one that comes and goes is told once."""
FINDINGS = TABLES["findings"]


class Alerts:
    """The findings that were there so far, and the errors among the new ones that no one has looked at yet."""

    def __init__(self) -> None:
        self._last: dict[str, int] | None = None
        self._unseen: set[str] = set()

    @property
    def unseen(self) -> int:
        """How many new errors wait to be looked at."""
        return len(self._unseen)

    def note(self, snapshot: Snapshot) -> Sequence[Finding]:
        """The new errors and warnings of a Snapshot, errors first; those of the first Snapshot are no news."""
        now = snapshot.taken_ns
        found = {FINDINGS.key(finding): finding for finding in FINDINGS.rows(snapshot)}
        last = dict.fromkeys(found, now) if self._last is None else self._last
        new = [
            key
            for key, finding in found.items()
            if finding.severity is not Severity.INFO and now - last.get(key, -AGAIN_NS) >= AGAIN_NS
        ]
        self._unseen |= {key for key in new if found[key].severity is Severity.ERROR}
        self._unseen &= found.keys()
        self._last = {key: at for key, at in last.items() if now - at < AGAIN_NS} | dict.fromkeys(found, now)
        return [found[key] for key in new]

    def looked(self) -> None:
        """The operator saw them all."""
        self._unseen.clear()
