"""What a column and a table of the Snapshot are, and the usual kinds of columns.

A :class:`Field` takes its value from an entity (``get``), and says how it is shown (``show``); sorting uses the value,
never the text. The tables themselves are in :mod:`memconsole.fields`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from memconsole.errors import UsageError
from memconsole.model import Part, Snapshot
from memconsole.units import format_address, format_size

Get = Callable[[Any], Any]
Show = Callable[[Any], str]


def shown_text(value: Any) -> str:
    """Plain text; what is not known is ``-``."""
    if value is None or value in {"", ()}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


def or_dash(show: Show) -> Show:
    """Show what is known; what is not is ``-``."""
    return lambda value: "-" if value is None else show(value)


class Field(msgspec.Struct, frozen=True):
    """One column: ``unit`` as a person reads it, ``width`` in cells, numbers to the right.

    ``part``: what of a Snapshot must be asked for to have it. ``news``: whether it is worth a mark when it changes,
    which what always runs on is not.
    """

    id: str
    title: str
    help: str
    get: Get
    show: Show = shown_text
    unit: str = ""
    width: int = 10
    right: bool = False
    default: bool = True
    part: Part | None = None
    news: bool = True

    @property
    def largest_first(self) -> bool:
        """Whether the largest are wanted first when rows are sorted by it: numbers and times, but not addresses."""
        return (self.right and self.unit != "address") or self.unit == "UTC"

    def text(self, item: Any) -> str:
        """The entity's value as it is shown."""
        return self.show(self.get(item))


def in_order(field: Field, items: Sequence[Any], *, reverse: bool) -> list[int]:
    """The indexes of entities, sorted by a field's value; equal ones as they were, the unknown always last."""
    values = [field.get(item) for item in items]
    known = [index for index, value in enumerate(values) if value is not None]
    known.sort(key=values.__getitem__, reverse=reverse)
    return known + [index for index, value in enumerate(values) if value is None]


class Table(msgspec.Struct, frozen=True):
    """A table of the Snapshot; its id names the command and the view, ``rows`` its entities, ``key`` their name.

    ``plain`` is an entity without what always runs on: where that is the same, the row is not marked as changed.
    """

    id: str
    title: str
    rows: Callable[[Snapshot], Sequence[Any]]
    key: Callable[[Any], str]
    fields: tuple[Field, ...] = ()
    plain: Callable[[Any], Any] = lambda item: item

    def pick(self, names: str | None) -> tuple[Field, ...]:
        """The fields named in a comma-separated list, ``all`` for every one, or the default ones.

        Raises:
            UsageError: a name that is no field of this table.
        """
        if not names:
            return tuple(item for item in self.fields if item.default)
        if names == "all":
            return self.fields
        return tuple(self.field(name.strip()) for name in names.split(",") if name.strip())

    def field(self, name: str) -> Field:
        """The field of this id.

        Raises:
            UsageError: there is none.
        """
        found = next((item for item in self.fields if item.id == name), None)
        if found is None:
            known = ", ".join(item.id for item in self.fields)
            raise UsageError(f"{self.id} has no field {name!r}", "", f"its fields: {known}")
        return found


def size_field(id: str, title: str, help: str, get: Get, *, width: int = 8, default: bool = True) -> Field:
    """Bytes, as a size."""
    return Field(id, title, help, get, or_dash(format_size), "bytes", width, right=True, default=default)


def number_field(id: str, title: str, help: str, get: Get, *, width: int = 6, default: bool = True) -> Field:
    """A count."""
    return Field(id, title, help, get, or_dash(lambda value: f"{value:,}"), "", width, right=True, default=default)


def address_field(id: str, title: str, help: str, get: Get, *, default: bool = True) -> Field:
    """An address, in hexadecimal."""
    return Field(id, title, help, get, or_dash(format_address), "address", 14, right=True, default=default)


def moment_field(id: str, title: str, help: str, get: Get, *, default: bool = False) -> Field:
    """A time, ns since the epoch, in UTC."""
    return Field(id, title, help, get, lambda value: _clock(value) if value else "-", "UTC", 20, default=default)


def _clock(ns: int) -> str:
    moment = datetime.datetime.fromtimestamp(ns // 1_000_000_000, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S")
