"""The app's hand on the brush: one key, one frame.

Left alone, Textual paints as soon as the first widget asks for it, and again a sixtieth of a second later what others
said in answer to it. Here a frame waits until the widgets have told each other what there was to tell.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import ClassVar, cast

from textual import events
from textual.geometry import Region, Size
from textual.reactive import Reactive, reactive
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import ContentSwitcher

from memconsole.views.composing import Changed, Picture, Sparing, Whole
from memconsole.views.ordering import Ordered
from memconsole.views.private import Scrolled, compose_with

ROUNDS = 16
"""Rounds of the event loop that a key's frame waits: well under a millisecond where nothing else is to be done."""
WRITTEN_S = 0.004
"""Seconds that the thread which writes to the terminal has for a frame before something else is begun."""
LATEST_S = 0.05
"""Seconds after a key by which its frame is out, or there is none."""


class Base(Screen[None]):
    """The screen below all dialogs. That the focus moved is said by the widgets it left and reached, not by all."""

    DEFAULT_CSS = "Base { layers: default prompt; }"

    focused: Reactive[Widget | None] = Reactive(None, repaint=False)
    _shown = False

    def update_node_styles(self, animate: bool = True) -> None:
        """Look up the styles of all there is, but not when it comes to the front first: each part has just done so."""
        first, self._shown = not self._shown, True
        if not (first and self.stack_updates == 1):
            super().update_node_styles(animate)


class Views(ContentSwitcher):
    """The views, one of them in front; it covers this, which is why this is not painted again."""

    current: reactive[str | None] = reactive(None, init=False, repaint=False)

    async def add(self, view: Widget) -> None:
        """Build a view behind the one in front."""
        view.display = False
        await self.mount(view)


class Sheet(Scrolled):
    """A ScrollView that is laid out and focused without being painted twice."""

    BARE: ClassVar[bool] = False
    """Whether its lines stand as they are: nothing is drawn beside, below or over them, at the most a frame above."""

    @property
    def painter(self) -> Painting:
        """The app, which knows when a frame is due."""
        return cast("Painting", self.app)

    _frame_alone = False
    _scrolled_for: tuple[Size, Size, Size] | None = None

    def scrolls_anew(self, virtual_size: Size) -> bool:
        """Leave the scrollbar alone where no size differs: every layout asks for it, and it is a frame of its own."""
        before, self._scrolled_for = self._scrolled_for, (virtual_size, self.container_size, self.size)
        return before != self._scrolled_for

    def render_lines(self, crop: Region) -> list[Strip]:
        """Some lines; of a bare one those that ``render_line`` made, the same objects as long as it keeps them.

        Textual makes each of them anew, and so all that was found out about it before: its filters, its codes, and that
        the terminal shows it already.
        """
        above = self.styles.gutter.top
        if not self.BARE:
            return super().render_lines(crop)
        framed = max(above - crop.y, 0)
        strips = [self.render_line(y - above) for y in range(crop.y + framed, crop.bottom)]
        for each in self.get_line_filters():
            background = self.background_colors[1]
            strips = [strip.apply_filter(each, background) for strip in strips]
        strips = [strip.crop(crop.x, crop.right) for strip in strips]
        return [*super().render_lines(Region(crop.x, crop.y, crop.width, framed)), *strips] if framed else strips

    def looks_parts_up(self) -> bool:
        """Not where the frame alone may differ."""
        return not self._frame_alone

    def watch_has_focus(self, has_focus: bool) -> None:
        """Look the frame up, if there is one: rules for the focus are of the frame alone, not of what it holds."""
        if self.styles.border_top[0]:
            self._frame_alone = True
            super().watch_has_focus(has_focus)
            self._frame_alone = False


class Painting(Ordered):
    """An App that answers a key with one frame."""

    def __init__(self, *, ansi_color: bool | None = None) -> None:
        super().__init__(ansi_color=ansi_color)
        self._picture = Picture()
        self._held = 0
        self._due: dict[Callable[[], None], None] = {}
        self._behind: dict[Callable[[], None], None] = {}
        self._busy = False

    def get_default_screen(self) -> Screen[None]:
        """The screen below all dialogs."""
        return Base(id="_default")

    def begins(self, child: Widget) -> None:
        """Have every screen composed sparingly."""
        if isinstance(child, Screen):
            compose_with(child, Sparing(self._picture))

    def paints(self, update: object) -> None:
        """Know what the terminal shows only as long as it is we who write."""
        if update is not None and not isinstance(update, Changed | Whole):
            self._picture.forget()

    async def hand_on(self, event: events.Key | events.Paste) -> None:
        """Hold the frame back until all that a key does has been done."""
        self.hold_frames()
        self._held += 1
        self._busy = True
        gc.disable()  # to look for garbage takes as long as a frame
        self._let_go(ROUNDS)
        await super().hand_on(event)

    def before_frame(self, do: Callable[[], None]) -> None:
        """Do this once, when all else that a key does is done; at once where no key is."""
        if self._held:
            self._due[do] = None
        else:
            do()

    def do_due(self) -> None:
        """Do what waits for the frame."""
        while self._due:
            do = next(iter(self._due))
            del self._due[do]
            do()

    def behind_frame(self, do: Callable[[], None]) -> None:
        """Do this once, when the frame that a key leads to is on the screen; at once where no key is being done."""
        if self._busy:
            self._behind[do] = None
        else:
            do()

    def _rest(self) -> None:
        """Between two keys: do what would have held the frame up."""
        if self._held or not self._busy:
            return
        self._busy = False
        gc.enable()
        waiting, self._behind = self._behind, {}
        for do in waiting if self.is_running else ():
            try:
                do()
            except Exception as error:  # noqa: BLE001 - as in _let_go
                self.report(error)

    def wrote(self) -> None:
        """The frame of a key is with the thread that writes it."""
        if self._busy and not self._held:
            asyncio.get_running_loop().call_later(WRITTEN_S, self._rest)

    def _let_go(self, rounds: int) -> None:
        if rounds:
            asyncio.get_running_loop().call_soon(self._let_go, rounds - 1)
            return
        self._held -= 1
        try:
            if not self._held:
                self.do_due()
        except Exception as error:  # noqa: BLE001 - no handler is beneath, to which Textual would look
            self.report(error)
        self.show_frames()
        asyncio.get_running_loop().call_later(LATEST_S, self._rest)
