"""Everything the console can do by name: the palette's entries, and the ``:`` line with its completion.

Grammar of the ``:`` line: ``VIEW [SUBJECT]``, ``macro NAME [KEY=VALUE ...]``, ``theme NAME``, ``at TIME``, ``now``,
``help``, ``quit``, or an action as the command line writes it (``reserve web 64M``, ``guest pause db1``).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.suggester import Suggester

from memconsole import actions, command
from memconsole.errors import UsageError
from memconsole.views.screens.acting import names_of

if TYPE_CHECKING:
    from memconsole.views.app import ConsoleApp


class Entry(NamedTuple):
    """Something that can be done: its name, what it does, and how."""

    name: str
    help: str
    run: Callable[[], object]


def entries(app: ConsoleApp) -> Iterator[Entry]:
    """Every entry of the palette: views, actions (on the chosen row), macros, and the console itself."""
    for view in app.VIEWS:
        yield Entry(f"Go to {view.title}", f"key {(app.VIEWS.index(view) + 1) % 10}", partial(app.open_view, view.name))
    for id, cls in actions.REGISTRY.items():
        why = app.why_not(id, "", None)
        help = f"not now: {why}" if why else cls.spec.help
        yield Entry(cls.spec.title, help, partial(app.begin_here, id))
    for macro in app.macros:
        yield Entry(f"Run macro {macro.name}", macro.title or macro.path, partial(app.action_macro, macro.name))
    yield Entry("Record a macro, or stop recording", "what is done and opened until then", app.action_record)
    yield Entry("Refresh now", "take a new snapshot", app.action_refresh)
    yield Entry("Pause or resume refreshing", "the picture stands still", app.action_pause)
    yield Entry("Earlier", "the past: the snapshot recorded before this one", partial(app.action_travel, -1))
    yield Entry("Later", "the snapshot recorded after this one", partial(app.action_travel, 1))
    yield Entry("Back to the present", "show what is now", app.action_present)
    yield Entry("Keys that work here", "help", app.action_keys)
    for theme in sorted(app.available_themes):
        yield Entry(f"Theme {theme}", "colours", partial(setattr, app, "theme", theme))
    yield Entry("Quit", "leave the console", app.action_quit)


class Commands(Provider):
    """The palette's entries."""

    @property
    def _entries(self) -> Iterator[Entry]:
        return entries(cast("ConsoleApp", self.app))

    async def discover(self) -> Hits:
        """Everything, before anything is typed."""
        for entry in self._entries:
            yield DiscoveryHit(entry.name, entry.run, help=entry.help)

    async def search(self, query: str) -> Hits:
        """What the query finds."""
        matcher = self.matcher(query)
        for entry in self._entries:
            score = matcher.match(f"{entry.name} {entry.help}")
            if score > 0:
                yield Hit(score, matcher.highlight(entry.name), entry.run, text=entry.name, help=entry.help)


def run_line(app: ConsoleApp, text: str) -> None:
    """Do what a ``:`` line says.

    Raises:
        UsageError: it says nothing that can be done.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{text!r} does not end", str(error), "close the quote") from None
    if not words:
        return
    first, rest = words[0], words[1:]
    if first in {"q", "quit", "exit"}:
        app.call_later(app.action_quit)
    elif first in {"help", "?"}:
        app.action_keys()
    elif first == "theme":
        _theme(app, " ".join(rest))
    elif first in {"at", "now"}:
        _travel(app, " ".join(rest) if first == "at" else "")
    elif first == "macro" and rest:
        _macro(app, rest)
    elif app.is_view(first) and not _is_action(words):
        app.open_view(first, " ".join(rest))
    elif any(cls.spec.words[0] == first for cls in actions.REGISTRY.values()) or first == "memconsole":
        app.propose(command.parse(words))
    else:
        raise UsageError(f"there is no command {first!r}", "", f"one of: {', '.join(candidates(app, []))}")


def _is_action(words: list[str]) -> bool:
    return any(cls.spec.words == tuple(words[: len(cls.spec.words)]) for cls in actions.REGISTRY.values())


def _travel(app: ConsoleApp, time: str) -> None:
    if time:
        app.travel_to(time)
    else:
        app.action_present()


def _theme(app: ConsoleApp, name: str) -> None:
    if name not in app.available_themes:
        raise UsageError(f"there is no theme {name!r}", "", f"themes: {', '.join(sorted(app.available_themes))}")
    app.theme = name


def _macro(app: ConsoleApp, words: list[str]) -> None:
    words = words[1:] if words[0] == "run" and len(words) > 1 else words
    given = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} sets nothing", "", "write KEY=VALUE")
        given[name] = value
    app.action_macro(words[0], given)


class LineSuggester(Suggester):
    """Completes the word being typed: commands first, then names of what their arguments are."""

    def __init__(self, app: ConsoleApp) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._app = app

    async def get_suggestion(self, value: str) -> str | None:
        """The line with its last word completed, or None."""
        head, _, last = value.rpartition(" ")
        done = head.split()
        for candidate in candidates(self._app, done):
            if candidate.startswith(last) and candidate != last:
                return f"{head} {candidate}" if head else candidate
        return None


def candidates(app: ConsoleApp, done: list[str]) -> Iterable[str]:
    """What may stand after these words."""
    if not done:
        seen = dict.fromkeys(
            [*(view.name for view in app.VIEWS), *(c.spec.words[0] for c in actions.REGISTRY.values())]
        )
        return [*seen, "macro", "theme", "at", "now", "help", "quit"]
    if done == ["theme"]:
        return sorted(app.available_themes)
    if done == ["macro"]:
        return [macro.name for macro in app.macros]
    if done == ["pfn"]:
        return [*names_of(actions.Kind.REGION, app.snapshot), *names_of(actions.Kind.GUEST, app.snapshot)]
    for cls in actions.REGISTRY.values():
        words = cls.spec.words
        if tuple(done[: len(words)]) == words:
            return _arguments(app, cls, done[len(words) :])
    return [
        cls.spec.words[1]
        for cls in actions.REGISTRY.values()
        if len(cls.spec.words) > 1 and done == [cls.spec.words[0]]
    ]


def _arguments(app: ConsoleApp, cls: type[actions.Action], given: list[str]) -> Iterable[str]:
    fields = actions.fields(cls)
    if given and given[-1].startswith("--"):
        field = next((field for field in fields if field.option == given[-1]), None)
        if field is not None and field.arg.kind is not actions.Kind.FLAG:
            return [*field.arg.choices, *names_of(field.arg.kind, app.snapshot)]
    positional = [field for field in fields if field.arg.positional]
    options = [
        field.option for field in fields if not field.arg.positional and field.arg.kind is not actions.Kind.WORDS
    ]
    plain = [word for word in given if not word.startswith("--")]
    if len(plain) < len(positional):
        return names_of(positional[len(plain)].arg.kind, app.snapshot)
    return [option for option in options if option not in given]
