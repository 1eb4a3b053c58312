"""What every value is built on: frozen, typed, serialisable."""

from __future__ import annotations

from typing import Literal

import msgspec

SNAPSHOT_FORMAT: Literal["memconsole.snapshot"] = "memconsole.snapshot"
SNAPSHOT_VERSION = 2
"""Raised when a reader of the version before would misunderstand a Snapshot: a field that is gone or means something
else, a new value of an enumeration. Not for a new field with a default, which older readers pass over."""


class Value(msgspec.Struct, frozen=True, gc=False):
    """The base of every value: immutable, compared by content; a field that a newer version adds is passed over.

    What is rewritten keeps such fields (:mod:`memconsole.newer`). What asks for something (:class:`Request`)
    is read strictly: to pass over a part of it would be to do something else than was asked.

    Values form trees, never cycles; the garbage collector need not walk the tens of thousands of a large Snapshot.
    """


class Request(Value, frozen=True, forbid_unknown_fields=True):
    """The base of what asks for something, or is written by hand: an unknown field is refused by name."""
