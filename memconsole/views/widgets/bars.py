"""The lines around a view: who and when, which views there are, where one is, and which keys work here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.cache import LRUCache
from textual.content import Content
from textual.events import Click
from textual.strip import Strip
from textual.visual import Visual
from textual.widget import Widget

from memconsole import actions, keys
from memconsole.escaping import escape
from memconsole.units import format_count

if TYPE_CHECKING:
    from textual.binding import ActiveBinding
    from textual.screen import Screen

    from memconsole.views.painting import Painting

Part = tuple[str, str]
KeyAt = tuple[int, int, str]
"""From which column to which there is what key."""
LEAST_TITLE = 3
KEPT = 32


def line(parts: Iterable[Part]) -> Content:
    """One line of styled parts, free of what a terminal would obey."""
    return Content.assemble(*((escape(text), style) for text, style in parts))


def plain(text: str) -> Content:
    """Text of others, which may have lines: no markup, and nothing that a terminal would obey."""
    return Content(escape(text, keep="\n"))


def width_of(parts: Iterable[Part]) -> int:
    """Cells of a line of parts."""
    return sum(cell_len(text) for text, _ in parts)


class Bar(Widget):
    """One line that is painted again only when its words change; what it said of late it need not make again."""

    DEFAULT_CSS = "Bar { height: 1; width: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self) -> None:
        super().__init__()
        self._left: tuple[Part, ...] = ()
        self._right: tuple[Part, ...] = ()
        self.keys_at: list[KeyAt] = []
        """Where a click is as good as a key."""
        self._looks: dict[str, Style] = {}
        self._made: LRUCache[tuple[tuple[Part, ...], tuple[Part, ...], int], Strip] = LRUCache(KEPT)

    def show_parts(self, left: Sequence[Part], right: Sequence[Part] = ()) -> None:
        """Show these parts at the left and at the right end."""
        if (self._left, self._right) != (tuple(left), tuple(right)):
            self._left, self._right = tuple(left), tuple(right)
            self.refresh()

    def on_click(self, event: Click) -> None:
        """What is clicked is as good as its key."""
        for start, end, key in self.keys_at:
            if start <= event.x < end:
                self.app.simulate_key(key)

    def notify_style_update(self) -> None:
        """Look at the colours again."""
        super().notify_style_update()
        self._looks.clear()
        self._made.clear()

    def render_line(self, y: int) -> Strip:
        """The line: both ends; where they do not fit, the left one is cut, and the right one if it is longer alone."""
        width = self.size.width
        if y:
            return Strip.blank(width, self.rich_style)
        said = (self._left, self._right, width)
        made = self._made.get(said)
        if made is None:
            right = self._strip(self._right)
            right = self._cut(right, width) if right.cell_length > width else right
            made = self._made[said] = Strip.join([self._cut(self._strip(self._left), width - right.cell_length), right])
        return made

    def _cut(self, strip: Strip, room: int) -> Strip:
        """A strip in so many cells, with an ellipsis where it was longer."""
        if strip.cell_length <= room:
            return strip.extend_cell_length(room, self._look(""))
        last = [*strip.crop(0, room)][-1:]
        cut = strip.crop(0, max(room - 1, 0))
        return Strip([*cut, *(Segment("…" + " " * (room - cut.cell_length - 1), style) for _, style, _ in last)])

    def _strip(self, parts: Iterable[Part]) -> Strip:
        return Strip([Segment(escape(text), self._look(style)) for text, style in parts if text])

    def _look(self, style: str) -> Style:
        """What a style of the theme looks like here."""
        found = self._looks.get(style)
        if found is None:
            [drawn] = Visual.to_strips(self, Content.styled("x", style), 1, 1, self.visual_style)
            found = self._looks[style] = (next(iter(drawn)).style or Style()).clear_meta_and_links()
        return found


class Header(Bar):
    """Product, host, source, read-only; whether the data is live, its age, the time."""

    DEFAULT_CSS = "Header { background: $panel; }"


class Title(Bar):
    """Where one is (a trail of subjects) and what the table shows."""

    DEFAULT_CSS = "Title { background: $background; }"


class Tabs(Bar):
    """The views by number; the present one stands out."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: LRUCache[
            tuple[tuple[tuple[str, str, int | None], ...], int, int], tuple[list[Part], list[KeyAt]]
        ] = LRUCache(KEPT)

    def show(self, names: Sequence[tuple[str, str, int | None]], current: int) -> None:
        """Show the views' keys and titles, with a count where there is one; ``current`` is an index, or -1.

        A click on one is as good as its key.

        Where they do not fit, counts are rounded down to thousands and the longest titles are cut; where that is not
        enough either, counts go, those at the left first.
        """
        said = (tuple(names), current, self.size.width)
        if said not in self._shown:
            self._shown[said] = self._laid(names, current)
        parts, self.keys_at = self._shown[said]
        self.show_parts(parts)

    def _laid(self, names: Sequence[tuple[str, str, int | None]], current: int) -> tuple[list[Part], list[KeyAt]]:
        """The parts, and from which column to which a click is as good as which key."""
        titles = [title for _, title, _ in names]
        lead, counts, behind = " {} ", [f" {count:,}" if count else "" for _, _, count in names], " "
        if (
            sum(len(lead) + len(title) + len(count) for title, count in zip(titles, counts, strict=True))
            > self.size.width
        ):
            lead, counts, behind = " {}", [f":{format_count(count)}" if count else "" for _, _, count in names], ""
            room = self.size.width - len(titles) * (len(lead) - 1)
            counts = fitting(counts, room - sum(min(len(title), LEAST_TITLE) for title in titles))
            titles = shortened(titles, room - sum(map(len, counts)))
        parts: list[Part] = []
        keys_at: list[KeyAt] = []
        for index, (title, count) in enumerate(zip(titles, counts, strict=True)):
            begin = width_of(parts)
            here = index == current
            style = "reverse $primary" if here else ""
            parts += [
                (lead.format(keys.shown(names[index][0])), "bold reverse $primary" if here else "bold $accent"),
                (title, f"bold {style}" if here else ""),
            ]
            if count:
                parts.append((count, style or "$text-muted"))
            parts.append((behind, style))
            keys_at.append((begin, width_of(parts), names[index][0]))
        return parts, keys_at


def shortened(titles: Sequence[str], room: int) -> list[str]:
    """The titles in so many cells together, the longest ones cut first; each keeps ``LEAST_TITLE`` letters."""
    longest = max((len(title) for title in titles), default=0)
    while longest > LEAST_TITLE and sum(min(len(title), longest) for title in titles) > room:
        longest -= 1
    return [title if len(title) <= longest else title[: longest - 1] + "…" for title in titles]


def fitting(counts: Sequence[str], room: int) -> list[str]:
    """The counts in so many cells together: where they are longer, those at the left are empty."""
    left = list(counts)
    for index in range(len(left)):
        if sum(map(len, left)) <= room:
            break
        left[index] = ""
    return left


def rank(id: str) -> int:
    """How far to the front a key of this id stands: opening and the map, what is done to the row, then the rest."""
    return 0 if id in {"open", "pfn"} else 1 if id in actions.REGISTRY else 2


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
            self.console.before_frame(self.list_keys)

    def on_resize(self) -> None:
        """Fit as many keys as there is room for."""
        self.list_keys()

    @property
    def console(self) -> Painting:
        """The app, which knows when a frame is due."""
        return cast("Painting", self.app)

    def list_keys(self) -> None:
        """Show the keys of the focused widget and its views."""
        found = self.screen.active_bindings
        self.grey = {key: active for key, active in found.items() if not active.enabled}
        shown: dict[str, ActiveBinding] = {}
        for key, active in found.items():
            id = active.binding.id or ""
            usual = id in keys.OF_BINDING and key == keys.split(keys.OF_BINDING[id].keys)[0]
            if usual or (id or key) not in shown:
                shown[id or key] = active
        listed = [active for active in shown.values() if active.binding.show and active.binding.description]
        listed.sort(key=lambda active: rank(active.binding.id or ""))
        last = [shown[id] for id in self.ALWAYS if id in shown]
        right = [part for active in last for part in self._key(active)]
        start = self.size.width - width_of(right)
        self.keys_at = []
        left: list[Part] = []
        at = 0
        for active in [each for each in listed if each not in last]:
            parts = self._key(active)
            if at + width_of(parts) > start:
                break
            left += parts
            at = self._clickable(active, at, parts)
        for active in last:
            start = self._clickable(active, start, self._key(active))
        self.show_parts(left, right)

    def _clickable(self, active: ActiveBinding, start: int, parts: Sequence[Part]) -> int:
        """Note where a key stands; returns where the next one begins."""
        end = start + width_of(parts)
        self.keys_at.append((start, end, active.binding.key))
        return end

    def _key(self, active: ActiveBinding) -> list[Part]:
        key = self.app.get_key_display(active.binding)
        if not active.enabled:
            return [(f" {key}", "$text-disabled"), (f" {active.binding.description} ", "$text-disabled strike")]
        return [(f" {key}", "bold $accent"), (f" {active.binding.description} ", "")]
