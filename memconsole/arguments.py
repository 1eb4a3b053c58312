"""How the arguments of Actions are written: on the command line, in dialogs and in macros."""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class ArgumentKind(enum.StrEnum):
    """How an argument is written and completed."""

    NEW_NAME = "new-name"
    REGION = "region"
    GUEST = "guest"
    GRANT = "grant"
    WINDOW = "window"
    SIZE = "size"
    ADDRESS = "address"
    BDF = "bdf"
    INTEGER = "integer"
    SECONDS = "seconds"
    CHOICE = "choice"
    FLAG = "flag"
    PATH = "path"
    TEXT = "text"
    WORDS = "words"


class Arg(msgspec.Struct, frozen=True):
    """How one field of an Action is written: its kind, help, whether it stands without a ``--name``, its choices."""

    kind: ArgumentKind
    help: str
    positional: bool = False
    choices: tuple[str, ...] = ()


class ActionField(msgspec.Struct, frozen=True):
    """A field of an Action as the command line, dialogs and macros see it; ``required`` when it has no default."""

    name: str
    arg: Arg
    required: bool
    default: Any

    @property
    def option(self) -> str:
        """The long option of a field that is not positional (``--page-size``)."""
        return "--" + self.name.replace("_", "-")
