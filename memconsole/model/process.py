"""Which process is meant: the PID alone may be another's by now."""

from __future__ import annotations

from typing import NamedTuple


class ProcessId(NamedTuple):
    """A process of this boot: its PID, and when it started, in clock ticks since boot (/proc/PID/stat, field 22)."""

    pid: int
    start_ticks: int

    @classmethod
    def known(cls, pid: int | None, start_ticks: int | None) -> ProcessId | None:
        """The process, or None where one of its numbers is not known."""
        return None if pid is None or start_ticks is None else cls(pid, start_ticks)
