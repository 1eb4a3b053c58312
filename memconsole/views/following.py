"""The app's ear: a thread asks the Source for Snapshots and posts them; a Source that fails is news, not an end."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable

from textual import work
from textual.message import Message
from textual.worker import Worker, WorkerState, get_current_worker

from memconsole.errors import MemconsoleError
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.views.painting import Painting
from memconsole.views.refresh import settle

GROUP = "follow"


class Arrived(Message):
    """A Snapshot, made of the former one's objects where they are equal."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self.snapshot = snapshot


class Lost(Message):
    """The source could not give a Snapshot."""

    def __init__(self, error: str) -> None:
        super().__init__()
        self.error = error


class Following(Painting):
    """An App that follows a Source.

    ``live`` is the Source that is followed, ``latest`` its last Snapshot, ``trouble`` why there is none newer,
    ``arrived_ns`` when it came. ``source`` and ``snapshot`` are what is shown: the same, unless that is the past.
    """

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
        self.trouble = ""
        self.paused = False
        self._asked_for = False
        self._wake = threading.Event()

    @work(thread=True, exclusive=True, group=GROUP, exit_on_error=False)
    def follow(self) -> None:
        """Take a Snapshot every ``interval`` seconds, or when woken, until cancelled."""
        worker = get_current_worker()
        latest = self.latest
        while not worker.is_cancelled:
            try:
                latest = settle(latest, self.live.snapshot())
            except (MemconsoleError, OSError) as error:
                self.post_message(Lost(str(error)))
            else:
                self.post_message(Arrived(latest))
            self._wake.wait(None if self.paused else self.interval)
            self._wake.clear()

    def on_unmount(self) -> None:
        """Let the thread end."""
        self.workers.cancel_group(self, GROUP)
        self._wake.set()

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """A fault in the source itself is shown like any other, and the source is asked again."""
        if event.worker.group == GROUP and event.state is WorkerState.ERROR:
            self.on_lost(Lost(f"{type(event.worker.error).__name__}: {event.worker.error}"))
            self.set_timer(self.interval, self.follow)

    def on_arrived(self, event: Arrived) -> None:
        """Show a Snapshot, unless the picture is to stand still."""
        self.latest, self.trouble, self.arrived_ns = event.snapshot, "", self.clock()
        if self.source is not self.live or (self.paused and not self._asked_for):
            return
        if self.snapshot is None:
            # What is there by now stays for good; collections that walk it would hold keys up, for 100 ms at a time.
            gc.freeze()
            gc.set_threshold(20_000, 20, 20)
        self._asked_for = False
        self.snapshot = event.snapshot
        self.show_snapshot()

    def on_lost(self, event: Lost) -> None:
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
