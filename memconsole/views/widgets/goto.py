"""The line of a map that asks where to go."""

from __future__ import annotations

from typing import ClassVar

from textual.binding import BindingType
from textual.message import Message

from memconsole.views.bound import bound
from memconsole.views.widgets.hinted import Hinted


class GoTo(Hinted):
    """Asks for a page; Escape thinks better of it."""

    BINDINGS: ClassVar[list[BindingType]] = [bound("pfn.leave-go", "leave", "Back", show=False)]

    class Left(Message):
        """The operator does not want to go anywhere."""

    def action_leave(self) -> None:
        """Say so."""
        self.post_message(self.Left())
