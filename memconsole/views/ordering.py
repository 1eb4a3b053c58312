"""The app's ear for keys: what is typed or pasted goes where the keys before it have led.

Left alone, Textual hands every key to what has the focus when it comes in; a key that opens a prompt, a dialog or the
next field is done later, and those behind it in one burst (a slow line, a paste, a script) go astray. Here a key waits
until the one before it has been done: a message is sent after it that rises through the same widgets up to the app,
``ROUNDS`` times, since what a key does may be a message itself. A first key waits for nothing but that there is all
it could lead to: while ``opening``, keys and buttons of the mouse wait.
"""

from __future__ import annotations

import time
from collections import deque

from textual import events
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer

from memconsole.views.enduring import Enduring

ROUNDS = 3
EARLY = (events.Key, events.Paste, events.MouseDown, events.MouseUp, events.MouseScrollDown, events.MouseScrollUp)
LONGEST_S = 2.0
"""Seconds after which keys go on although the widget that had the last one never answered: it is gone, or hangs."""


class Done(Message):
    """Sent behind a key: once it is here, the key has been here too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Ordered(Enduring):
    """An App that does one key after the other."""

    def __init__(self, *, ansi_color: bool | None = None) -> None:
        super().__init__(ansi_color=ansi_color)
        self._typed: deque[events.Key | events.Paste] = deque()
        self._rounds = 0
        self._number = 0
        self._asked: Screen[object] | None = None
        self._patience: Timer | None = None
        self._typed_at = time.monotonic()
        self.opening = True
        self._early: list[events.Event] = []

    @property
    def untouched_s(self) -> float:
        """Seconds since the last key."""
        return time.monotonic() - self._typed_at

    @property
    def typing(self) -> bool:
        """Whether keys are still to be done."""
        return self.is_running and (bool(self._typed) or bool(self._early) or self._rounds > 0)

    async def opened(self) -> None:
        """All that a key could lead to is there: do those that came before."""
        self.opening = False
        early, self._early = self._early, []
        for event in early:
            await self.on_event(event)

    async def on_event(self, event: events.Event) -> None:
        """Do a key, or keep it until those before it are done."""
        if self.opening and isinstance(event, EARLY) and not event.is_forwarded:
            self._early.append(event)
        elif not isinstance(event, events.Key | events.Paste) or event.is_forwarded:
            await super().on_event(event)
        elif self._rounds:
            self._typed.append(event)
        else:
            await self._do(event)

    async def hand_on(self, event: events.Key | events.Paste) -> None:
        """Hand a key, or what was pasted, to what has the focus."""
        await super().on_event(event)

    async def _do(self, event: events.Key | events.Paste) -> None:
        self._rounds, self._typed_at = ROUNDS, time.monotonic()
        self._patience = self.set_timer(LONGEST_S, self._next)
        await self.hand_on(event)
        self._follow_up()

    def _follow_up(self) -> None:
        self._number += 1
        self._asked = self.screen
        if self.is_running and not (self.focused or self.screen).post_message(Done(self._number)):
            self.screen.post_message(Done(self._number))  # what had the focus is about to go

    async def on_done(self, message: Done) -> None:
        """Do the next key, if the one before has been where it could go and what it did has been done as well."""
        message.stop()
        if message.number != self._number or not self._rounds:
            return
        self._rounds = ROUNDS if self._asked is not self.screen else self._rounds - 1
        if self._rounds:
            self._follow_up()
        else:
            await self._next()

    async def _next(self) -> None:
        self._rounds = 0
        if self._patience is not None:
            self._patience.stop()
            self._patience = None
        if self._typed:
            await self._do(self._typed.popleft())
