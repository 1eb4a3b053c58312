"""The app's ear: a thread asks the Source for Snapshots and posts them; a Source that fails is news, not an end."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from textual import work
from textual.message import Message
from textual.worker import get_current_worker

from memconsole import unforeseen
from memconsole.differ import settled
from memconsole.errors import MemconsoleError
from memconsole.model import Finding, Part, Severity, Snapshot
from memconsole.rates import rated
from memconsole.source import Source
from memconsole.views.alerting import Alerts
from memconsole.views.painting import Painting

GROUP = "follow"
TOLD = 3
"""New findings that are told one by one; of more, only how many there are."""
ERROR_S, WARNING_S = 20.0, 8.0
"""How long they stay on the screen."""

SOON_S = 0.05
REST_S = 3.0
"""Seconds without a key after which none is expected at once."""
WORTH = 10
"""Collections of young garbage after which one of the old is worth its time."""


class SnapshotArrived(Message):
    """A Snapshot, made of the former one's objects where they are equal."""

    def __init__(self, snapshot: Snapshot, took_s: float = 0.0) -> None:
        super().__init__()
        self.snapshot = snapshot
        self.took_s = took_s


class SnapshotLost(Message):
    """The source could not give a Snapshot."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error


class Following(Painting):
    """An App that follows a Source.

    ``live`` is the Source that is followed, ``latest`` its last Snapshot, ``trouble`` why there is none newer,
    ``arrived_ns`` when it came, ``took_s`` how long it was waited for. ``source`` and ``snapshot`` are what is shown:
    the same, unless that is the past. ``parts`` are what is asked for besides.
    """

    parts: frozenset[Part] = frozenset()

    def __init__(self, source: Source, *, interval: float, clock: Callable[[], int] = time.time_ns) -> None:
        # Without this NO_COLOR would still get shades of grey.
        super().__init__(ansi_color=True if "NO_COLOR" in os.environ else None)
        self.live = source
        self.source = source
        self.latest: Snapshot | None = None
        self.interval = interval
        self.clock = clock
        self.snapshot: Snapshot | None = None
        self.arrived_ns = clock()
        self.took_s = 0.0
        self.trouble = ""
        self.paused = False
        self._asked_for = False
        self.alerts = Alerts()
        self._wake = threading.Event()
        self._used: Snapshot | None = None
        """The last Snapshot that says what is used: rates are since then."""

    @work(thread=True, exclusive=True, group=GROUP, exit_on_error=False, description="follow")
    def follow(self) -> None:
        """Take a Snapshot every ``interval`` seconds, or when woken, until cancelled."""
        worker = get_current_worker()
        latest = self.latest
        while not worker.is_cancelled:
            asked = time.monotonic()
            found = unforeseen.attempt("the survey", "console", partial(self._newest, latest))
            if isinstance(found, MemconsoleError):
                self.post_message(SnapshotLost(str(found)))
            else:
                latest = found
                self.post_message(SnapshotArrived(latest, time.monotonic() - asked))
            self._wake.wait(None if self.paused else self.interval)
            self._wake.clear()

    def on_unmount(self) -> None:
        """Let the thread end."""
        gc.enable()
        self.workers.cancel_group(self, GROUP)
        self._wake.set()

    def _newest(self, before: Snapshot | None) -> Snapshot:
        found = rated(self._used, self.live.snapshot(self.parts))
        if found.usage is not None:
            self._used = found
        return settled(before, found)

    def want(self, parts: frozenset[Part]) -> None:
        """Ask for these parts from now on; at once where there is one among them that was not asked for.

        At once is after the frame in which what asks for them is shown, which to take a Snapshot would hold up.
        """
        more, self.parts = parts - self.parts, parts
        if more:
            self.set_timer(SOON_S, self._wake.set)

    def on_snapshot_arrived(self, event: SnapshotArrived) -> None:
        """Show a Snapshot; a key that is being done comes first."""
        self.behind_frame(partial(self._show_arrived, event))

    def _show_arrived(self, event: SnapshotArrived) -> None:
        """Show a Snapshot, unless the picture is to stand still."""
        self.latest, self.trouble, self.arrived_ns = event.snapshot, "", self.clock()
        self.took_s = event.took_s
        self.announce(self.alerts.note(event.snapshot))
        if self.source is not self.live or (self.paused and not self._asked_for):
            return
        if self.snapshot is None:
            # What is there by now stays for good; collections that walk it would hold keys up, for 100 ms at a time.
            gc.freeze()
            gc.set_threshold(20_000, 20, 50 * WORTH)
        self._asked_for = False
        self.snapshot = event.snapshot
        self.show_snapshot()

    def tidy(self) -> None:
        """Look for old garbage while no one types, since that takes as long as several frames."""
        if self.untouched_s > REST_S and gc.get_count()[2] >= WORTH:
            gc.collect()

    def announce(self, new: Sequence[Finding]) -> None:
        """Tell of new findings, errors with the terminal's bell; it rings once for all that came together."""
        for finding in new[:TOLD]:
            error = finding.severity is Severity.ERROR
            self.notify(
                finding.observed,
                title=f"{'✖ error' if error else '▲ warning'} {finding.id} {finding.subject}",
                severity="error" if error else "warning",
                timeout=ERROR_S if error else WARNING_S,
                markup=False,
            )
        if len(new) > TOLD:
            self.notify(f"{len(new) - TOLD:,} more new findings: see Audit", severity="warning", markup=False)
        if any(finding.severity is Severity.ERROR for finding in new):
            self.bell()

    def on_snapshot_lost(self, event: SnapshotLost) -> None:
        """Say that what is shown grows old."""
        self.trouble = event.error
        self.show_state()

    def action_refresh(self) -> None:
        """Take a Snapshot now."""
        self._asked_for = True
        self._wake.set()

    def action_pause(self) -> None:
        """Let the picture stand still, or move again."""
        self.paused = not self.paused
        self._wake.set()
        self.show_state()

    def show_snapshot(self) -> None:
        """Show the Snapshot that came."""
        raise NotImplementedError

    def show_state(self) -> None:
        """Show how old the Snapshot is and whether the source answers."""
        raise NotImplementedError
