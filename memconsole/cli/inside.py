"""The command line inside of another face: its commands as values, and run on a Source that is open already."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence

from memconsole import cli
from memconsole.cli import connect, output
from memconsole.cli.parser import build, parse
from memconsole.command import CommandForm, CommandResult, forms
from memconsole.errors import UsageError
from memconsole.source import Source

ALONE = (("demo",), ("open",), ("serve",), ("bridge",), ("macro", "record"))
"""Commands that have the terminal, or the process, to themselves."""
OF_THE_HOST = (("libvirt", "setup"), ("libvirt", "remove"))
"""Commands that change this host's configuration, which need not be the host that is shown."""
ELSEWHERE = (("macro", "run"),)
"""Commands whose own way a face has, with its questions."""


class Inside:
    """The commands that another face offers; ``given`` are the words by which they ask the control process it shows."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        self._given = list(given)

    @functools.cached_property
    def forms(self) -> Sequence[CommandForm]:
        """Every command that can be run inside of another face."""
        return [form for form in forms(build()) if form.words not in (*ALONE, *OF_THE_HOST, *ELSEWHERE)]

    def run(self, words: Sequence[str], source: Source) -> CommandResult:
        """Run one on a Source; it asks nothing, and applies no action.

        Raises:
            UsageError: it needs a terminal of its own, is an action, or does not parse.
        """
        words = list(words[1:] if words[:1] == ["memconsole"] else words)
        shut: dict[tuple[str, ...], str] = {
            **dict.fromkeys(ALONE, "it has a terminal or a process to itself"),
            **dict.fromkeys(OF_THE_HOST, "it changes the host that the console runs on, not the one that it shows"),
        }
        why = next((why for each, why in shut.items() if tuple(words[: len(each)]) == each), "")
        if not words or why:
            what = f"{shlex.join(words) or 'memconsole'} cannot be run inside of the console"
            raise UsageError(what, why or "it has a terminal or a process to itself", "type it in a shell")
        asked = parse(words)
        if (getattr(asked, "action", "") or getattr(asked, "acts", False)) and not getattr(asked, "dry_run", False):
            raise UsageError(f"{words[0]} acts", "it wants its plan to be seen", "type it without options of the shell")
        with output.kept() as told, connect.using(source):
            code = cli.main([*self._given, *words])
        return CommandResult(code, told.getvalue())
