"""The past of a control process: it records Snapshots, at most so often, and shows those that were recorded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from memconsole.backend.history.store import History
from memconsole.backend.history.writer import MAX_BYTES, Recorder
from memconsole.errors import KernelRefused
from memconsole.model import Finding, Severity, Snapshot


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
