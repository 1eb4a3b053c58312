"""The console on a terminal, with this user's settings, macros and memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from memconsole import paths
from memconsole.command import CommandLine
from memconsole.commandlog import CommandLog
from memconsole.fleet import Fleet
from memconsole.macros import Macro
from memconsole.source import Source
from memconsole.units import format_time
from memconsole.views import settings as settings_module
from memconsole.views import terminal
from memconsole.views.app import ConsoleApp
from memconsole.views.places import Place
from memconsole.views.remembering import Memory
from memconsole.views.scripting import Command


def run(
    source: Source,
    *,
    macros: Sequence[Macro] | None = None,
    interval: float = 1.0,
    record_to: Path | None = None,
    command: Command | None = None,
    on_quit_warning: Callable[[], str] | None = None,
    command_line: CommandLine | None = None,
    begin_at: Place | None = None,
) -> int:
    """Open the console on a Source until the operator leaves; returns the exit code.

    ``macros`` None stands for those in the macro directories, as their files become; ``record_to`` records everything
    into a macro file; ``command`` runs the commands that macros have, ``command_line`` what is typed behind ``:``;
    ``begin_at`` is where it opens.

    Raises:
        BadFile: ``console.toml`` cannot be used.
    """
    app = ConsoleApp(
        source,
        interval=interval,
        known_macros=macros,
        record_to=record_to,
        command=command,
        settings=settings_module.load(),
        on_quit_warning=on_quit_warning,
        memory=Memory(paths.own_state_dir()),
        command_line=command_line,
        said=CommandLog(paths.own_state_dir(), f"{os.getpid()} {format_time(time.time_ns())[11:19]}"),
    )
    app.begin_at = begin_at
    with terminal.logged(paths.state_dir() / "console.log"):
        asyncio.run(terminal.run(app, mouse=app.mouse))
    return app.return_code or 0


def run_many(fleet: Fleet, open_one: Callable[[str, Place], int], *, interval: float = 1.0) -> int:
    """Open the console of many hosts, from it that of one, and that of many again, until the operator leaves.

    ``open_one`` opens the console of one host by its name, at a place, as :func:`run` does.
    """
    from memconsole.views.fleetapp import FleetApp

    begin_at: Place | None = None
    while True:
        app = FleetApp(
            fleet,
            interval=interval,
            settings=settings_module.load(),
            memory=Memory(paths.own_state_dir()),
            said=CommandLog(paths.own_state_dir(), f"{os.getpid()} {format_time(time.time_ns())[11:19]}"),
        )
        app.begin_at = begin_at
        with terminal.logged(paths.state_dir() / "console.log"):
            asyncio.run(terminal.run(app, mouse=app.mouse))
        if app.into is None:
            return app.return_code or 0
        begin_at = app.trail[0]
        open_one(app.into.host, app.into.place)
