"""What the kernel says of the frame under a map's cursor, asked for in a thread once the cursor rests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from textual import work
from textual.message import Message
from textual.timer import Timer
from textual.worker import get_current_worker

from memconsole import unforeseen
from memconsole.errors import MemconsoleError
from memconsole.model import FrameState
from memconsole.source import Source
from memconsole.views.view import View
from memconsole.views.widgets.facts import Fact
from memconsole.views.widgets.heatmap import HeatMap

RESTS_S = 0.15
"""How long a cursor rests before the kernel is asked: not for every frame that it passes."""


class FrameAsking(View):
    """The base of maps whose pages have frames."""

    class FrameTold(Message):
        """What is known of a frame, or why nothing is."""

        def __init__(self, pfn: int, state: FrameState | None, why: str) -> None:
            super().__init__()
            self.pfn = pfn
            self.state = state
            self.why = why

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._told: FrameAsking.FrameTold | None = None
        self._wanted: int | None = None
        self._resting: Timer | None = None

    def frame_facts(self, pfn: int | None) -> Sequence[Fact]:
        """The frame's flags and how often it is mapped, where they are known by now; else they are asked for."""
        if pfn != self._wanted:
            self._wanted = pfn
            if self._resting is not None:
                self._resting.stop()
            known = self._told is not None and self._told.pfn == pfn
            self._resting = None if pfn is None or known else self.set_timer(RESTS_S, partial(self._ask_frame, pfn))
        told = self._told
        if pfn is None or told is None or told.pfn != pfn:
            return [Fact("Kernel", "-" if pfn is None else "…", "dim"), Fact("Mapped", "-", "dim")]
        if told.state is None:
            return [Fact("Kernel", told.why, "dim"), Fact("Mapped", "-", "dim")]
        return [
            Fact("Kernel", " ".join(told.state.flags) or "no flags"),
            Fact("Mapped", f"{told.state.mapped:,} time{'s' * (told.state.mapped != 1)}"),
        ]

    def forget_frames(self) -> None:
        """Ask anew: it is another map, or was read again."""
        self._told = self._wanted = None

    def _ask_frame(self, pfn: int) -> None:
        self._ask_frame_in_thread(self.console.source, pfn)

    @work(thread=True, exclusive=True, group="frame", exit_on_error=False, description="frame")
    def _ask_frame_in_thread(self, source: Source, pfn: int) -> None:
        worker = get_current_worker()
        found = unforeseen.attempt("a frame", "console", partial(source.frame, pfn))
        if worker.is_cancelled:
            return
        if isinstance(found, MemconsoleError):
            self.post_message(self.FrameTold(pfn, None, found.why or found.what))
        else:
            self.post_message(self.FrameTold(pfn, found, ""))

    def on_frame_asking_frame_told(self, message: FrameTold) -> None:
        """Say it, if the cursor is there yet."""
        message.stop()
        self._told = message
        if message.pfn == self._wanted:
            self.say_facts()

    def show_bookmarks(self) -> None:
        """Mark the pages that are remembered."""
        self.query_one(HeatMap).book(self.console.memory.pages_of(self.id or "", self.subject))

    def say_facts(self) -> None:
        """Show what is known of the page under the cursor."""
        raise NotImplementedError
