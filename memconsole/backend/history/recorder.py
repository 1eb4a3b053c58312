"""The past of a control process: it records Snapshots, at most so often, and shows those that were recorded."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from memconsole.backend.history.store import History
from memconsole.backend.history.writer import MAX_BYTES, Recorder
from memconsole.errors import KernelRefused
from memconsole.model import Finding, Severity, Snapshot

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

log = logging.getLogger("memconsole.history")

ScannedSince: TypeAlias = "Callable[[Mapping[str, int]], Sequence[tuple[str, ExtentTable]]]"
"""The PFN maps that were scanned after what is known of each key, ns since the epoch."""

PATIENT = 1.5
"""So many times the interval passes until nobody else is believed to take Snapshots."""
REST_TIMES = 20
"""So many times as long as a map took to be recorded, it is not recorded again."""


class HistoryRecorder:
    """The history in a directory; every method may be called from any thread.

    With ``every_s`` it records, at most so often; with 0 it only shows what was recorded there before.

    Raises:
        Refused: another process records there (``HistoryTaken``).
        KernelRefused: the directory cannot be used.
    """

    def __init__(self, directory: Path, every_s: float = 0, *, max_bytes: int = MAX_BYTES) -> None:
        self._every_ns = int(every_s * 1e9)
        self._recorder = Recorder(directory, max_bytes=max_bytes) if every_s else None
        self._recording = threading.Lock()
        self._looking = threading.Lock()
        self._history = History(directory)
        self._last: int | None = None
        self._trouble: KernelRefused | None = None
        self._mapped: dict[str, int] = {}
        self._map_due: dict[str, float] = {}

    def findings(self) -> tuple[Finding, ...]:
        """The files that are set aside, and that nothing is recorded at present, and why."""
        recorder, trouble = self._recorder, self._trouble
        aside = recorder.findings() if recorder is not None else ()
        if trouble is None:
            return tuple(aside)
        remedy = trouble.remedy or "see the service's log"
        return (*aside, Finding("history-stopped", Severity.WARNING, "history", trouble.what, trouble.why, remedy))

    @property
    def every_s(self) -> float:
        """How often it records, in seconds; 0: it does not."""
        return self._every_ns / 1e9

    def is_due(self, taken_ns: int) -> bool:
        """Whether a Snapshot of this time would be recorded: the last one that was is old enough."""
        since = taken_ns - self._last if self._last is not None else self._every_ns
        return self._recorder is not None and not 0 <= since < self._every_ns

    def lacks(self, now_ns: int, latest_ns: int | None, own_ns: int) -> bool:
        """Whether a Snapshot is to be taken for the history alone.

        One is due, and none comes by itself: the latest, of ``latest_ns``, is old, or is the one that was taken for the
        history last, at ``own_ns``.
        """
        comes = latest_ns is not None and latest_ns != own_ns and now_ns - latest_ns < self._every_ns * PATIENT
        return self.is_due(now_ns) and not comes

    def note(self, snapshot: Snapshot) -> None:
        """Record a Snapshot if the last one recorded is old enough; one that cannot be written is a finding."""
        with self._recording:
            if self._recorder is None or not self.is_due(snapshot.taken_ns):
                return
            self._last = snapshot.taken_ns
            try:
                self._recorder.record(snapshot)
            except KernelRefused as error:
                self._trouble = error
            else:
                self._trouble = None

    def note_maps(self, scanned: ScannedSince) -> None:
        """Record the PFN maps that were scanned since it was asked last; they are closed.

        One is recorded again once twenty times what it took have passed: a large one that changes all the time costs a
        twentieth of a processor. One that cannot be written is a finding.
        """
        with self._recording:
            recorder = self._recorder
            if recorder is None:
                return
            for key, table in scanned(self._mapped):
                with contextlib.closing(table):
                    if time.monotonic() >= self._map_due.get(key, 0):
                        self._note_map(recorder, key, table)
                        self._mapped[key] = table.scanned_ns

    def _note_map(self, recorder: Recorder, key: str, table: ExtentTable) -> None:
        began = time.monotonic()
        try:
            if not recorder.record_map(key, table):
                log.warning("the PFN map of %s is too large for this history", key)
        except KernelRefused as error:
            self._trouble = error
        now = time.monotonic()
        self._map_due[key] = now + REST_TIMES * (now - began)

    def map_at(self, key: str, at_ns: int) -> ExtentTable:
        """The PFN map of a key as it was last scanned until ``at_ns``, which the caller closes.

        Raises:
            NotFound: none was recorded until then. BadFile: it is damaged.
        """
        with self._looking:
            return self._history.map_at(key, at_ns)

    def times(self, after: int = 0) -> Sequence[int]:
        """The times of what is recorded, ns since the epoch, oldest first; only those above ``after``.

        Raises:
            BadFile: the file is damaged, or of another version.
        """
        with self._looking:
            return self._history.times(after)

    def at(self, time_ns: int) -> Snapshot:
        """The last Snapshot recorded until ``time_ns``.

        Raises:
            NotFound: none was recorded until then, or it is too old to be kept.
            BadFile: its file is damaged before it.
        """
        with self._looking:
            return self._history.at(time_ns)

    def close(self) -> None:
        """Let another process record there; what was recorded can still be looked at."""
        with self._recording:
            if self._recorder is not None:
                self._recorder.close()
                self._recorder = None
        with self._looking:
            self._history.close()
