"""What may come next on a command line that is being typed: asked by a shell, by the names that exist now."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

from memconsole import macros
from memconsole.arguments import ArgumentKind
from memconsole.cli import connect
from memconsole.cli.parser import build
from memconsole.errors import MemconsoleError
from memconsole.model import Snapshot

_NAMES: dict[str, Callable[[Snapshot], list[str]]] = {
    ArgumentKind.REGION: lambda found: [each.name for each in found.regions],
    ArgumentKind.GUEST: lambda found: [each.name for each in found.guests],
    ArgumentKind.GRANT: lambda found: [each.id for each in found.grants],
    ArgumentKind.WINDOW: lambda found: [each.id for each in found.windows],
    ArgumentKind.BDF: lambda found: [each.bdf for each in found.devices],
    "target": lambda found: [*(each.name for each in found.regions), *(each.name for each in found.guests)],
}
_FILES = {"FILE", "PATH", "DIR", "A", "B"}
"""The words that stand for a file."""
_KINDS = {kind.value.upper(): kind.value for kind in ArgumentKind} | {"REGION-OR-GUEST": "target"}
"""What an argument is, by the word that stands for it in the help."""


def answer() -> None:
    """Write what may come next for the shell that asks, and end; nothing, where no shell asks."""
    import argcomplete
    from argcomplete.completers import SuppressCompleter

    argcomplete.autocomplete(attached(build()), default_completer=SuppressCompleter())


def attached(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, with what completes each of its arguments."""
    from argcomplete.completers import FilesCompleter

    for action in _arguments(parser):
        word = str(action.metavar)
        kind = _KINDS.get(word)
        if kind in _NAMES:
            action.completer = _existing(kind)  # type: ignore[attr-defined]
        elif "|" in word:
            action.completer = _fixed(word.split("|"))  # type: ignore[attr-defined]
        elif word in _FILES:
            action.completer = FilesCompleter()  # type: ignore[attr-defined]
        elif word == "FILE-OR-NAME":
            action.completer = lambda **_: [macro.name for macro in macros.discover()[0]]  # type: ignore[attr-defined]
    return parser


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to walk a parser
        yield action
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for sub in action.choices.values():
                yield from _arguments(sub)


def _fixed(words: list[str]) -> Callable[..., list[str]]:
    """What completes a choice."""
    return lambda **_: words


def _existing(kind: str) -> Callable[..., list[str]]:
    """What completes a name: those that the control process knows now; none, where none answers, or another host's."""

    def names(*, parsed_args: argparse.Namespace, **_: object) -> list[str]:
        usual = {"socket": None, "host": None, "hosts": None, "embedded": False}
        asked = argparse.Namespace(**{**usual, **vars(parsed_args)})
        if connect.asked_hosts(asked) != [""]:
            return []  # a key must not wait for ssh
        with contextlib.suppress(MemconsoleError, OSError):
            found = connect.client(asked)
            with contextlib.closing(found):
                return _NAMES[kind](found.snapshot())
        return []

    return names


def script(options: argparse.Namespace) -> int:
    """The completion of a shell, for its start file."""
    from memconsole.cli import output
    from memconsole.cli.shelldocs import completion

    output.document(completion(options.shell))
    return 0
