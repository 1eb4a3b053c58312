"""Textual's private names: all that the console uses, behind public ones of its own.

Textual is pinned to one version, and ``NAMES`` lists what would have to be looked at with another: a test holds that
they are there, and that no other file of the views uses any.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import IO, Any

from rich.console import RenderableType
from textual.app import App
from textual.dom import DOMNode
from textual.driver import Driver as BaseDriver
from textual.drivers.linux_driver import LinuxDriver
from textual.geometry import Size
from textual.message import Message
from textual.message_pump import MessagePump
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.widget import Widget

NAMES: Mapping[type, frozenset[str]] = {
    App: frozenset({"_begin_batch", "_driver", "_end_batch", "_handle_exception", "_register_child", "_running"}),
    DOMNode: frozenset({"_bindings", "_get_component_classes"}),
    BaseDriver: frozenset({"_mouse"}),
    LinuxDriver: frozenset({"_disable_mouse_support", "_enable_mouse_support", "_file"}),
    MessagePump: frozenset({"_dispatch_message"}),
    Screen: frozenset({"_compositor"}),
    Widget: frozenset({"_scroll_update"}),
}
"""What is used of each class, by the class that Textual defines it in."""

Dispatch = Callable[[Message], Awaitable[None]]


class Overseen(App[None]):
    """An App through which every message of its widgets goes, and every exception that Textual would end it for."""

    def _register_child(self, parent: DOMNode, child: Widget, before: int | None, after: int | None) -> None:
        """Every widget and screen passes here before it begins."""
        child.__dict__.setdefault("_dispatch_message", partial(self.dispatch, child._dispatch_message))  # noqa: SLF001
        super()._register_child(parent, child, before, after)

    async def _dispatch_message(self, message: Message) -> None:
        await self.dispatch(super()._dispatch_message, message)

    def _handle_exception(self, error: Exception) -> None:
        """What Textual calls with every exception that left a handler, a timer, a worker or a rendering."""
        if not self.outlived(error):
            super()._handle_exception(error)

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


class Scrolled(ScrollView):
    """A ScrollView that says when its scrollbars are laid out, and what of the style sheet it looks up."""

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
