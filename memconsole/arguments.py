"""How one argument of an Action is written by people, read from what they wrote, and completed."""

from __future__ import annotations

import enum
import shlex
from typing import Any

import msgspec

from memconsole.errors import UsageError
from memconsole.units import exact_size, format_address, parse_address, parse_bdf, parse_size


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


def read_value(field: ActionField, text: str) -> Any:
    """The value of one field from what a person wrote.

    Raises:
        UsageError: the text is not a value of the field's kind.
    """
    kind = field.arg.kind
    if kind is ArgumentKind.SIZE:
        return parse_size(text)
    if kind is ArgumentKind.ADDRESS:
        return parse_address(text)
    if kind is ArgumentKind.BDF:
        return parse_bdf(text)
    if kind is ArgumentKind.FLAG:
        if text.lower() not in {"yes", "no", "true", "false", "1", "0"}:
            raise UsageError(f"{text!r} is neither yes nor no", f"{field.name} takes one of the two", "write yes or no")
        return text.lower() in {"yes", "true", "1"}
    if kind is ArgumentKind.WORDS:
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(
                f"{text!r} cannot be split into words", str(error), "close the quotes, as for a shell"
            ) from None
    if kind in {ArgumentKind.INTEGER, ArgumentKind.SECONDS}:
        try:
            return int(text) if kind is ArgumentKind.INTEGER else float(text)
        except ValueError:
            raise UsageError(f"{text!r} is not a number", f"{field.name} takes a number", "write digits") from None
    return text


def write_value(field: ActionField, value: Any) -> str:
    """What a person would write for a value; :func:`read_value` reads it back."""
    kind = field.arg.kind
    if kind is ArgumentKind.SIZE:
        return exact_size(value)
    if kind is ArgumentKind.ADDRESS:
        return format_address(value) if value else "0"
    if kind is ArgumentKind.FLAG:
        return "yes" if value else "no"
    if kind is ArgumentKind.WORDS:
        return shlex.join(value)
    if kind is ArgumentKind.SECONDS:
        return f"{value:g}"
    return str(value)
