"""Textual's private names: all that the console uses, behind public ones of its own.

Textual is pinned to one version, and ``NAMES`` lists what would have to be looked at with another: a test holds that
they are there, and that no other file of the views uses any.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import IO, Any

from rich.color import Color
from rich.console import RenderableType
from rich.segment import Segment
from rich.style import Style as RichStyle
from textual._compositor import Compositor, CompositorUpdate, LayoutUpdate
from textual.app import App
from textual.dom import DOMNode
from textual.driver import Driver as BaseDriver
from textual.drivers.linux_driver import LinuxDriver
from textual.geometry import Region, Size
from textual.message import Message
from textual.message_pump import MessagePump
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.scrollbar import ScrollBar, ScrollBarRender
from textual.strip import Strip
from textual.widget import Widget

NAMES: Mapping[type, frozenset[str]] = {
    App: frozenset(
        {
            "_begin_batch",
            "_display",
            "_driver",
            "_end_batch",
            "_handle_exception",
            "_register_child",
            "_running",
            "_start_widget",
        }
    ),
    Compositor: frozenset({"_dirty_regions", "_regions_to_spans", "_render_chops"}),
    DOMNode: frozenset({"_bindings", "_get_component_classes"}),
    BaseDriver: frozenset({"_mouse"}),
    LinuxDriver: frozenset({"_disable_mouse_support", "_enable_mouse_support", "_file"}),
    MessagePump: frozenset({"_dispatch_message"}),
    Screen: frozenset({"_compositor"}),
    Widget: frozenset({"_scroll_update", "_vertical_scrollbar"}),
}
"""What is used of each class, by the class that Textual defines it in."""

Dispatch = Callable[[Message], Awaitable[None]]
Update = CompositorUpdate
"""What a compositor has to paint; its ``render_segments`` is called when it is written to the terminal."""
WholeUpdate = LayoutUpdate
"""Such of all lines of a screen."""


class Overseen(App[None]):
    """An App through which every message of its widgets goes, and every exception that Textual would end it for."""

    def _register_child(self, parent: DOMNode, child: Widget, before: int | None, after: int | None) -> None:
        """Every widget and screen passes here before it begins."""
        child.__dict__.setdefault("_dispatch_message", partial(self.dispatch, child._dispatch_message))  # noqa: SLF001
        self.begins(child)
        super()._register_child(parent, child, before, after)

    async def _dispatch_message(self, message: Message) -> None:
        await self.dispatch(super()._dispatch_message, message)

    def _handle_exception(self, error: Exception) -> None:
        """What Textual calls with every exception that left a handler, a timer, a worker or a rendering."""
        if not self.outlived(error):
            super()._handle_exception(error)

    def begins(self, child: Widget) -> None:
        """A widget or a screen is about to begin."""

    async def dispatch(self, handle: Dispatch, message: Message) -> None:
        """Have a message handled."""
        await handle(message)

    def outlived(self, error: Exception) -> bool:  # noqa: ARG002 - for those who do
        """Whether the App goes on after an exception that nothing else took."""
        return False

    def report(self, error: Exception) -> None:
        """Treat an exception as Textual treats one that left a handler."""
        self._handle_exception(error)

    def hold_frames(self) -> None:
        """Paint nothing until :meth:`show_frames`, which is called as often."""
        self._begin_batch()

    def show_frames(self) -> None:
        """Paint what was held back."""
        self._end_batch()
        if self._running:
            self.screen.check_idle()

    def _display(self, screen: Screen[Any], renderable: RenderableType | None) -> None:
        """What is written to the terminal passes here."""
        self.paints(renderable)
        super()._display(screen, renderable)
        if renderable is not None:
            self.wrote()

    def paints(self, update: RenderableType | None) -> None:
        """An update is about to be written."""

    def wrote(self) -> None:
        """An update was handed to what writes it."""


class Composed(Compositor):
    """A compositor that is told which lines, or which parts of them, are to be painted."""

    def render_full_update(self, simplify: bool = False) -> LayoutUpdate:
        """All of the screen; ``simplify`` is for pictures."""
        if simplify:
            return super().render_full_update(simplify=True)
        self._dirty_regions.clear()
        return self.compose_whole()

    def render_partial_update(self) -> Any:
        """What changed since the last update."""
        spans = [*self._regions_to_spans([each.intersection(self.size.region) for each in self._dirty_regions])]
        self._dirty_regions.clear()
        return self.compose_changed(spans) if spans else None

    def _render_chops(self, crop: Region, is_rendered_line: Callable[[int], bool]) -> Sequence[Mapping[int, Strip]]:
        return self.compose([line for line in crop.line_range if is_rendered_line(line)])

    def compose_whole(self) -> WholeUpdate:
        """All of the screen."""
        raise NotImplementedError

    def compose_changed(self, spans: Collection[tuple[int, int, int]]) -> Update:
        """What is in these spans (line, first column, column behind the last one), ordered by line."""
        raise NotImplementedError

    def compose(self, lines: Collection[int]) -> Sequence[Mapping[int, Strip]]:
        """What is on these lines, by column; of every other line nothing."""
        raise NotImplementedError


def compose_with(screen: Screen[Any], compositor: Composed) -> None:
    """Have a screen, which has not been shown yet, composed by this compositor."""
    screen._compositor = compositor  # noqa: SLF001 - Textual makes it itself, and asks nobody


class Rail(ScrollBar):
    """A scrollbar whose lines are the same objects wherever they look the same, instead of 50 new ones for a step."""

    def __init__(self, *, thickness: int) -> None:
        super().__init__(name="vertical", thickness=thickness)
        self._known: dict[Segment, Strip] = {}

    def render_lines(self, crop: Region) -> list[Strip]:
        """The lines of the rail."""
        bar, background = self.render(), self.background_colors[1]
        if not isinstance(bar, ScrollBarRender) or not isinstance(bar.style, RichStyle):
            return super().render_lines(crop)
        back, front = bar.style.bgcolor or Color.default(), bar.style.color or Color.default()
        drawn = bar.render_bar(
            self.size.height, bar.virtual_size, bar.window_size, bar.position, bar.thickness,
            back_color=back, bar_color=front,
        )  # fmt: skip
        strips = [self._known.setdefault(each, Strip([each])) for each in drawn.segments[crop.y : crop.bottom]]
        for filter in self.get_line_filters():
            strips = [strip.apply_filter(filter, background) for strip in strips]
        return strips


class Scrolled(ScrollView):
    """A ScrollView that says when its scrollbars are laid out, and what of the style sheet it looks up."""

    @property
    def vertical_scrollbar(self) -> ScrollBar:
        """The bar at the right, made when it is asked for first."""
        if self._vertical_scrollbar is None:
            self._vertical_scrollbar = Rail(thickness=self.scrollbar_size_vertical)
            self._vertical_scrollbar.display = False
            self.app._start_widget(self, self._vertical_scrollbar)  # noqa: SLF001 - as Widget's own does
        return self._vertical_scrollbar

    def _scroll_update(self, virtual_size: Size) -> None:
        if self.scrolls_anew(virtual_size):
            super()._scroll_update(virtual_size)

    def _get_component_classes(self) -> frozenset[str]:  # type: ignore[override]  # of this one, not of the class
        """What is looked up in the style sheet besides the widget itself."""
        return super()._get_component_classes() if self.looks_parts_up() else frozenset()

    def scrolls_anew(self, virtual_size: Size) -> bool:  # noqa: ARG002 - for those who know better
        """Whether the scrollbars have to be laid out for this size."""
        return True

    def looks_parts_up(self) -> bool:
        """Whether the styles of the widget's parts are looked up with its own."""
        return True

    def lay_scrollbars(self) -> None:
        """Lay the scrollbars out now, not only with the layout, when it is too late for this frame."""
        self._scroll_update(self.virtual_size)


class Driver(LinuxDriver):
    """A driver that writes to what :meth:`outlet` makes of the terminal's file."""

    def __init__(self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: Any = None) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size)
        self._file: Any = self.outlet(self._file, app)

    def outlet(self, file: IO[str], app: App[Any]) -> Any:  # noqa: ARG002 - for those who ask it
        """What is written to."""
        return file

    def use_mouse(self, *, on: bool) -> None:
        """Have the terminal tell of the mouse, or leave it to the terminal (to mark and copy text with)."""
        self._mouse = True
        if on:
            self._enable_mouse_support()
        else:
            self._disable_mouse_support()
        self._mouse = on


def unbind(app: App[Any], key: str) -> None:
    """Have a key do nothing that it was bound to with ``bind``."""
    app._bindings.key_to_bindings.pop(key, None)  # noqa: SLF001 - there is bind, and nothing that takes it back


def use_mouse(app: App[Any], *, on: bool) -> None:
    """Have the terminal of an app tell of the mouse, or leave it to the terminal."""
    driver = app._driver  # noqa: SLF001 - public in no way
    if isinstance(driver, Driver):
        driver.use_mouse(on=on)


def painted(screen: Screen[Any]) -> RenderableType | None:
    """All that is on a screen, as it was painted last."""
    return screen._compositor.render_update(full=True)  # noqa: SLF001 - as export_screenshot does
