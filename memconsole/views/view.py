"""What a view is: a widget that shows one part of the Snapshot, has a title, and may be about one subject."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from textual.containers import Container
from textual.strip import Strip

from memconsole.model import Part, Snapshot
from memconsole.views.console import Console
from memconsole.views.widgets.bars import plain
from memconsole.views.widgets.table import VirtualTable

if TYPE_CHECKING:
    from textual.geometry import Region
    from textual.widget import Widget


class View(Container):
    """The base of every view. The app calls :meth:`about` when it opens the view, and :meth:`show` with every Snapshot
    while it is in front; the widget's keys, with ids, are its BINDINGS.
    """

    DEFAULT_CSS = "View { height: 1fr; width: 1fr; }"

    PARTS: ClassVar[frozenset[Part]] = frozenset()
    """What of a Snapshot it shows that must be asked for."""

    subject = ""

    def render_lines(self, crop: Region) -> list[Strip]:
        """Blank lines, all alike: little of them is seen, and every view that comes in front is asked for all."""
        strip = Strip.blank(crop.width, self.rich_style)
        for each in self.get_line_filters():
            strip = strip.apply_filter(each, self.background_colors[1])
        return [strip] * crop.height

    @property
    def console(self) -> Console:
        """The app, which has the Source, the Snapshot and ``open_view``."""
        return cast("Console", self.app)

    @property
    def room(self) -> int:
        """Columns there are for a view; known before it is laid out, when ``size`` is still nothing."""
        return self.app.size.width

    @property
    def parts(self) -> frozenset[Part]:
        """What of a Snapshot it shows at present that must be asked for."""
        return self.PARTS

    def about(self, subject: str) -> None:
        """Be about this subject (``region:NAME``, ``guest:NAME``...; empty for none); :meth:`show` follows."""
        self.subject = subject

    @property
    def page(self) -> int | None:
        """Where in the subject one is: the page of a map under the cursor."""
        return None

    @property
    def spot(self) -> str:
        """The same, as people write it; empty where there is no such place."""
        return ""

    def aim(self, target: str | int | None) -> None:
        """Go to a place within the subject (of a map: a page, or what a person would type), if there is one."""

    def show_bookmarks(self) -> None:
        """Mark the places in the subject that are remembered, if there is more than one place in it."""

    def show(self, snapshot: Snapshot) -> None:
        """Show a Snapshot; cheap when nothing changed."""
        raise NotImplementedError

    @property
    def help_title(self) -> str:
        """What the help calls the keys that are the view's own."""
        return "This view"

    @property
    def legend(self) -> Sequence[tuple[str, str]]:
        """Glyphs of its own, each with what it says; the help lists those that are on the screen."""
        return ()

    @property
    def status(self) -> str:
        """A few words beside the title: how many rows, what order, what filter."""
        table = self.current_table
        return "" if table is None else table_status(table)

    @property
    def current_table(self) -> VirtualTable | None:
        """The table that keys go to, or the first one."""
        focused = self.screen.focused
        if isinstance(focused, VirtualTable) and self in focused.ancestors:
            return focused
        return next(iter(self.query(VirtualTable)), None)

    @property
    def first_focus(self) -> Widget | None:
        """What gets the keys when the view opens."""
        return self.current_table


def entitle(widget: Widget, title: str) -> None:
    """Write a title into a widget's frame, as text without markup; it is painted again only when it differs."""
    markup = plain(title).markup
    if widget.border_title != markup:
        widget.border_title = markup


def table_status(table: VirtualTable) -> str:
    """How many rows, in what order, by what filter: ``12 of 10,000 · by Size ▼ · /web``; or what is wrong with it."""
    rows = table.rows
    if table.complaint:
        return f"✖ {table.complaint}"
    words = [f"{len(rows):,} of {rows.total:,}" if rows.filter_text else f"{rows.total:,}"]
    if rows.sort_field is not None:
        words.append(f"by {rows.sort_field.title} {'▼' if rows.reverse else '▲'}")
    if rows.filter_text:
        words.append(f"/{rows.filter_text}")
    if rows.marked:
        hidden = rows.hidden_marks
        words.append(f"{len(rows.marked):,} marked" + (f", {hidden:,} of them not shown" if hidden else ""))
    return " · ".join(words)


def subject_of(table_id: str, item: Any) -> str:
    """How an entity of a table is named as a subject: ``region:web``, ``grant:g3``, ``window:0000:00:04.0:0``."""
    from memconsole.fields import TABLES

    return f"{table_id.removesuffix('s')}:{TABLES[table_id].key(item)}"
