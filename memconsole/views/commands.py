"""Everything the console can do by name: the palette's entries, and the ``:`` line.

Grammar of the ``:`` line: ``VIEW [SUBJECT]``, a word of :mod:`memconsole.views.words` (``export FILE``, ``at TIME``,
``go BOOKMARK``, ...), an action as the command line writes it (``reserve web 64M``, ``guest pause db1``), or any other
of its commands (``handoff check``, ``diff @-1h live``): those that are views too, such as ``regions``, with an option.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider

from memconsole import actions, command
from memconsole.errors import UsageError
from memconsole.views import completing
from memconsole.views.console import Console
from memconsole.views.widgets.bars import plain
from memconsole.views.words import word_of


class PaletteEntry(NamedTuple):
    """Something that can be done: its name, what it does, and how."""

    name: str
    help: str
    run: Callable[[], object]


def entries(app: Console) -> Iterator[PaletteEntry]:
    """Every entry of the palette: views, actions (on the chosen row), macros, and the console itself."""
    for number, view in enumerate(app.numbered_views, 1):
        yield PaletteEntry(f"Go to {view.title}", f"key {number % 10}", partial(app.open_view, view.name))
    for id, cls in actions.REGISTRY.items():
        why = app.why_not(id, "", None)
        help = f"not now: {why}" if why else cls.spec.help
        yield PaletteEntry(cls.spec.title, help, partial(app.begin_here, id))
    for macro in app.macros:
        yield PaletteEntry(f"Run macro {macro.name}", macro.title or macro.path, partial(app.action_macro, macro.name))
    yield PaletteEntry("Undo the last action", "plan what undoes it", app.action_undo)
    yield PaletteEntry("Command lines", "what was done, as command lines; a macro of them", app.action_said)
    yield PaletteEntry("Record a macro, or stop recording", "record actions and views until then", app.action_record)
    yield PaletteEntry("Refresh now", "take a new snapshot", app.action_refresh)
    yield PaletteEntry("Pause or resume refreshing", "freeze or unfreeze the display", app.action_pause)
    yield PaletteEntry("Earlier", "show the snapshot recorded before this one", partial(app.action_travel, -1))
    yield PaletteEntry("Later", "show the snapshot recorded after this one", partial(app.action_travel, 1))
    yield PaletteEntry("Back to the present", "show the live snapshot", app.action_present)
    yield PaletteEntry("Keys that work here", "help", app.action_keys)
    yield PaletteEntry("Mouse on or off", "off: the terminal marks and copies text with it", app.action_mouse)
    for theme in app.themes:
        yield PaletteEntry(f"Theme {theme}", "colours", partial(app.use_theme, theme))
    yield PaletteEntry("Quit", "leave the console", app.leave_console)


class Commands(Provider):
    """The palette's entries."""

    @property
    def _entries(self) -> Iterator[PaletteEntry]:
        return entries(cast("Console", self.app))

    async def discover(self) -> Hits:
        """Everything, before anything is typed."""
        for entry in self._entries:
            yield DiscoveryHit(plain(entry.name), entry.run, text=entry.name, help=plain(entry.help).markup)

    async def search(self, query: str) -> Hits:
        """What the query finds."""
        matcher = self.matcher(query)
        for entry in self._entries:
            score = matcher.match(f"{entry.name} {entry.help}")
            if score > 0:
                yield Hit(
                    score, matcher.highlight(plain(entry.name).markup), entry.run, entry.name, plain(entry.help).markup
                )


def run_line(app: Console, text: str) -> None:
    """Do what a ``:`` line says.

    Raises:
        UsageError: it says nothing that can be done.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r} has an open quote", str(error), "close the quote") from None
    if not words:
        return None
    first, rest = words[0], words[1:]
    if first == "memconsole" and rest:
        return run_line(app, shlex.join(rest))
    word = word_of(first)
    if word is not None and not (first == "macro" and rest[:1] == ["list"]):
        return word.run(app, rest)
    form = next((each for each in app.forms if each.words == tuple(words[: len(each.words)])), None)
    if form is not None and form.action:
        return app.propose(command.parse(words))
    if not rest and first not in {view.name for view in app.numbered_views} and _more(app, first):
        return _without_form(app, words)
    is_command = form is not None and (len(form.words) > 1 or any(word.startswith("-") for word in rest))
    if app.is_view(first) and not is_command:
        return app.open_view(first, " ".join(rest))
    if form is None or tuple(words[:2]) == ("history", "commands"):
        return _without_form(app, words)
    return app.run_command(words)


def _more(app: Console, first: str) -> list[str]:
    """The words that may follow one that is no command alone."""
    return [form.words[1] for form in app.forms if form.words[0] == first and len(form.words) > 1]


def _without_form(app: Console, words: list[str]) -> None:
    if words[:2] == ["history", "commands"]:
        app.action_said()
        return
    more = _more(app, words[0])
    if more:
        raise UsageError(
            f"{shlex.join(words)} is not a whole command", "", f"{words[0]} takes one of: {', '.join(more)}"
        )
    raise completing.unknown(app, words[0])
