"""Whom a command talks to: the control process where it answers, else this process, where that makes sense."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from memconsole import paths
from memconsole.errors import NoControl
from memconsole.source import ReadOnly, Source

if TYPE_CHECKING:
    from memconsole.backend.control import Control


def asked_socket(options: argparse.Namespace) -> Path:
    """The control socket to ask: the one the command line names, else the nearest one that may be asked."""
    return Path(options.socket) if options.socket else paths.nearest_socket()


def socket_of(options: argparse.Namespace) -> Path:
    """The control socket the command line names, or the usual one (``$XDG_RUNTIME_DIR`` without root)."""
    return Path(options.socket) if options.socket else paths.control_socket()


def embedded(reason: str = "", *, record_s: float = 0) -> Control:
    """A control process inside this one; ``reason`` forbids actions; ``record_s``: it records a history."""
    from memconsole.backend.control import embedded as build

    return build(read_only=reason, record_s=record_s)


@contextmanager
def source(options: argparse.Namespace, *, need: Literal["read", "plan", "act"] = "read") -> Iterator[Source]:
    """The Source a command works on, closed when the command ends.

    Reading and planning fall back to this process when no control process answers; acting does not, because what it
    would reserve would vanish with this command.

    Raises:
        NoControl: acting, and nothing answers.
    """
    found: Source
    if options.embedded:
        found = embedded()
    else:
        from memconsole.backend.wire.client import Client

        try:
            found = Client(asked_socket(options))
        except NoControl as error:
            if need == "act":
                raise NoControl(
                    error.what,
                    error.why,
                    "open the console (memconsole) or start the control process (memconsole serve); what a lone command"
                    " reserves would vanish with it",
                ) from None
            found = embedded("" if need == "plan" else "no control process answers")
    try:
        yield ReadOnly(found, "--read-only was given") if options.read_only else found
    finally:
        found.close()
