"""A line to type on that says, while it is empty, what may stand there."""

from __future__ import annotations

from textual.widgets import Input

from memconsole.views.widgets.fitting import fit


class Hinted(Input):
    """An Input whose hint ends in an ellipsis where there is no room for all of it."""

    def __init__(self, hint: str = "", *, id: str | None = None, select_on_focus: bool = True) -> None:
        super().__init__(id=id, select_on_focus=select_on_focus)
        self._hint = hint

    def hint(self, text: str) -> None:
        """Say something else."""
        self._hint = text
        self._fit()

    def on_resize(self) -> None:
        """Say as much of it as there is room for."""
        self._fit()

    def _fit(self) -> None:
        room = self.content_size.width
        self.placeholder = fit(self._hint, room).rstrip() if room else self._hint
