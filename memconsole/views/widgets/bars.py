"""The lines around a view: who and when, which views there are, where one is, and which keys work here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from textual.content import Content
from textual.widget import Widget

from memconsole import actions
from memconsole.views.widgets.table import printable

if TYPE_CHECKING:
    from textual.binding import ActiveBinding
    from textual.screen import Screen

Part = tuple[str, str]


def line(parts: Iterable[Part]) -> Content:
    """One line of styled parts, free of what a terminal would obey."""
    return Content.assemble(*((printable(text), style) for text, style in parts))


def spread(left: Content, right: Content, width: int) -> Content:
    """``left`` and ``right`` at the ends of one line; the left one is cut where both do not fit."""
    room = max(width - right.cell_length, 0)
    return Content.assemble(left.truncate(room, ellipsis=True, pad=True), right)


class Bar(Widget):
    """One line that is painted again only when its words change."""

    DEFAULT_CSS = "Bar { height: 1; width: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self) -> None:
        super().__init__()
        self._left: tuple[Part, ...] = ()
        self._right: tuple[Part, ...] = ()

    def say(self, left: Sequence[Part], right: Sequence[Part] = ()) -> None:
        """Show these parts at the left and at the right end."""
        if (self._left, self._right) != (tuple(left), tuple(right)):
            self._left, self._right = tuple(left), tuple(right)
            self.refresh()

    def render(self) -> Content:
        """The line."""
        return spread(line(self._left), line(self._right), self.size.width)


class Header(Bar):
    """Product, host, source, read-only; whether the data is live, its age, the time."""

    DEFAULT_CSS = "Header { background: $panel; }"


class Title(Bar):
    """Where one is (a trail of subjects) and what the table shows."""

    DEFAULT_CSS = "Title { background: $background; }"


class Tabs(Bar):
    """The views by number; the present one stands out."""

    def show(self, names: Sequence[tuple[str, int | None]], current: int) -> None:
        """Show the views' titles with a count where there is one; ``current`` is an index, or -1."""
        wide = self.size.width >= 110
        parts: list[Part] = []
        for index, (title, count) in enumerate(names):
            here = index == current
            style = "reverse $primary" if here else ""
            number = (index + 1) % 10
            lead = f" {number} " if wide else f" {number}"
            parts += [
                (lead, "bold reverse $primary" if here else "bold $accent"),
                (title, f"bold {style}" if here else ""),
            ]
            if wide and count:
                parts.append((f" {count:,}", style or "$text-muted"))
            parts.append((" " if wide else "", style))
        self.say(parts)


def rank(id: str) -> int:
    """How far to the front a key of this id stands: opening first, then what is done to the row, then the rest."""
    return 0 if id == "open" else 1 if id in actions.REGISTRY or id == "pfn" else 2


class Keys(Bar):
    """The keys that work here, the most particular ones first; grey ones say on pressing why they do not."""

    DEFAULT_CSS = "Keys { background: $panel; }"
    ALWAYS = ("command", "help", "quit")

    def __init__(self) -> None:
        super().__init__()
        self.grey: dict[str, ActiveBinding] = {}
        """The keys that do nothing at present."""

    def on_mount(self) -> None:
        """Follow the focus."""
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, screen: Screen[object]) -> None:
        if self.is_attached and screen is self.screen:
            self.list_keys()

    def on_resize(self) -> None:
        """Fit as many keys as there is room for."""
        self.list_keys()

    def list_keys(self) -> None:
        """Show the keys of the focused widget and its views."""
        found = self.screen.active_bindings
        self.grey = {key: active for key, active in found.items() if not active.enabled}
        shown = {active.binding.id or key: active for key, active in found.items()}
        listed = [active for active in shown.values() if active.binding.show and active.binding.description]
        listed.sort(key=lambda active: rank(active.binding.id or ""))
        last = [active for active in listed if active.binding.id in self.ALWAYS]
        right = [part for active in last for part in self._key(active)]
        room = self.size.width - sum(len(text) for text, _ in right)
        left: list[Part] = []
        for active in listed:
            if active.binding.id not in self.ALWAYS:
                parts = self._key(active)
                room -= sum(len(text) for text, _ in parts)
                if room < 0:
                    break
                left += parts
        self.say(left, right)

    def _key(self, active: ActiveBinding) -> list[Part]:
        key = self.app.get_key_display(active.binding)
        if not active.enabled:
            return [(f" {key}", "$text-disabled"), (f" {active.binding.description} ", "$text-disabled strike")]
        return [(f" {key}", "bold $accent"), (f" {active.binding.description} ", "")]
