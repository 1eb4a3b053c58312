"""Looks by itself whether this host could hand its guests on: when something that a handoff depends on has changed.

What it depends on is taken from a Snapshot, and from the kernels in ``/boot``; how much memory is left counts in
sixteenths. A check runs the plan of ``handoff run``, which changes nothing; it is not made while a handoff is under
way, nor more often than every ``REST_S`` seconds or twenty times what the last one took, and after ``OLDEST_S``
seconds at any rate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path

from memconsole import readiness
from memconsole.actions import HandoffRun
from memconsole.model import HandoffState, Plan, Readiness, Snapshot

REST_S = 5.0
OLDEST_S = 600.0
SHARE = 20


class ReadinessCheck:
    """The check of one control process; ``plan`` plans an action, ``root`` is where ``/boot`` lies."""

    def __init__(self, plan: Callable[[HandoffRun], Plan], root: Path) -> None:
        self._plan = plan
        self._root = root
        self._depended: Hashable = None
        self._ended_s = 0.0
        self.found: Readiness | None = None

    def due(self, taken: Snapshot) -> Hashable:
        """What a check depends on, if one is due: something changed since the last, or that is old; else None.

        This host rests between two checks, and none is made of a handoff under way.
        """
        if taken.handoff is not None and taken.handoff.state is HandoffState.RUNNING:
            return None
        since = time.monotonic() - self._ended_s
        if self.found is not None and since < max(REST_S, SHARE * self.found.took_ns / 1e9):
            return None
        depends = self._depends_on(taken)
        return depends if self.found is None or since > OLDEST_S or depends != self._depended else None

    def check(self, depends: Hashable) -> None:
        """Judge every condition; ``depends`` is what :meth:`due` gave."""
        self.found = readiness.judge(self._plan)
        self._ended_s, self._depended = time.monotonic(), depends

    def _depends_on(self, taken: Snapshot) -> Hashable:
        memory, survival = taken.memory, taken.survival
        return (
            tuple((each.name, each.size, each.state, each.store, each.segments) for each in taken.regions),
            tuple((each.name, each.kind, each.state, each.pid, each.agent) for each in taken.guests),
            tuple((each.id, each.state, each.length, each.dma) for each in taken.grants),
            tuple((each.bdf, each.driver, each.holders) for each in taken.devices),
            tuple((each.id, each.guest) for each in taken.windows if each.guest),
            tuple(each.id for each in taken.quarantine),
            tuple(sorted({(each.id, each.subject) for each in taken.findings})),
            (survival.kho, survival.luo, survival.kexec_count, survival.scratch, survival.sessions),
            (memory.total, memory.available * 16 // max(memory.total, 1)),
            taken.handoff.began_ns if taken.handoff is not None else None,
            self._kernels(),
        )

    def _kernels(self) -> Hashable:
        try:
            with os.scandir(self._root / "boot") as found:
                return tuple(sorted((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in found))
        except OSError as error:
            return error.errno
