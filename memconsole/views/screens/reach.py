"""Who reaches what: a guest's memory with its frames, windows and IOVAs side by side; a frame with all who reach it.

The tables behind it are read in a thread, when the view is opened and when the operator asks again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.content import Content
from textual.message import Message
from textual.worker import get_current_worker

from memconsole import joined, unforeseen
from memconsole.errors import MemconsoleError
from memconsole.fields import REACHED, SPANS
from memconsole.joined import Frame, Joined
from memconsole.model import Snapshot
from memconsole.source import Source
from memconsole.views.bound import bound
from memconsole.views.view import View, entitle
from memconsole.views.widgets.facts import Lines
from memconsole.views.widgets.fitting import fit
from memconsole.views.widgets.table import VirtualTable


class Reach(View):
    """A target (``reach:TARGET``, see :func:`joined.resolve_target`): a guest joined, or a frame and who reaches it."""

    DEFAULT_CSS = """
    Reach > Lines { padding: 0 1; height: auto; }
    Reach > VirtualTable { height: 1fr; border-top: solid $border; border-title-color: $secondary; }
    Reach > VirtualTable:focus { border-top: solid $primary; border-title-color: $primary; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        bound("reach.again", "again", "Ask again", tooltip="read the tables again"),
    ]

    class Answered(Message):
        """A target was looked for: with what it is, or why nothing is known."""

        def __init__(self, target: str, answer: Joined | Frame | None, error: MemconsoleError | None) -> None:
            super().__init__()
            self.target = target
            self.answer = answer
            self.error = error

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.answer: Joined | Frame | None = None
        self.error: MemconsoleError | None = None
        self._target = ""
        self._asked: Source | None = None

    def compose(self) -> ComposeResult:
        """What it is about, and a table of either kind."""
        yield Lines()
        yield VirtualTable(SPANS, empty="it has no memory mapped", id="spans")
        yield VirtualTable(REACHED, empty="no process, guest or device reaches it", id="reachers")

    def about(self, subject: str) -> None:
        """Look for another target."""
        super().about(subject)
        target = subject.partition(":")[2]
        if target != self._target:
            self._target, self.answer, self.error, self._asked = target, None, None, None

    def show(self, snapshot: Snapshot) -> None:
        """Ask, if this source was not asked yet; what was found stays as it was read."""
        if self._asked is not self.console.source:
            self._ask(snapshot)

    def action_again(self) -> None:
        """Ask again."""
        if self.console.snapshot is not None:
            self._ask(self.console.snapshot)

    def _ask(self, snapshot: Snapshot) -> None:
        self._asked = self.console.source
        self._show_lines()
        self._ask_in_thread(self._asked, snapshot, self._target)

    @work(thread=True, exclusive=True, group="reach", exit_on_error=False, description="ask")
    def _ask_in_thread(self, source: Source, snapshot: Snapshot, target: str) -> None:
        worker = get_current_worker()
        answer = unforeseen.attempt("reach", "console", partial(joined.resolve_target, snapshot, source, target))
        if worker.is_cancelled:
            return
        if isinstance(answer, MemconsoleError):
            self.post_message(self.Answered(target, None, answer))
        else:
            self.post_message(self.Answered(target, answer, None))

    def on_reach_answered(self, message: Answered) -> None:
        """Show what was found."""
        message.stop()
        if message.target == self._target:
            self.answer, self.error = message.answer, message.error
            self._show_lines()

    def _show_lines(self) -> None:
        spans, reachers = self.query_one("#spans", VirtualTable), self.query_one("#reachers", VirtualTable)
        answer = self.answer
        spans.display, reachers.display = isinstance(answer, Joined), isinstance(answer, Frame)
        if isinstance(answer, Joined):
            spans.load(answer.spans)
            entitle(spans, f" {SPANS.title} {len(answer.spans):,}{' and more' if answer.more else ''} ")
        elif isinstance(answer, Frame):
            reachers.load(answer.reached)
            entitle(reachers, f" {REACHED.title} {len(answer.reached):,} ")
        self.query_one(Lines).show_lines(self._lines())
        shown = spans if spans.display else reachers
        if shown.display and self.console.view is self:
            self.screen.set_focus(shown, scroll_visible=False)

    def _lines(self) -> list[Content]:
        width = max(self.room - 2, 20)
        if self.error is not None:
            said = [f"✖ {self.error.what}", self.error.why, self.error.remedy]
            return [Content.styled(fit(line, width), "$error") for line in said if line]
        if self.answer is None:
            return [Content.styled(f"looking for {self._target} ...", "$text-muted")]
        lines = []
        if isinstance(self.answer, Frame):
            lines = [Content(fit(line, width)) for line in joined.frame_lines(self.answer)]
        unseen = [f"not seen: {gap.source}: {gap.why}" for gap in self.answer.unseen]
        return lines + [Content.styled(fit(line, width), "$warning") for line in unseen]
