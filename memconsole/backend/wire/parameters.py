"""The parameters of each method of the service, as a call gives them; one that is unknown is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from memconsole.model import Part


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a call."""


class Nothing(Strict, frozen=True):
    """Of a method that takes none."""


class Interface(Strict, frozen=True):
    """The interface to describe, by its name."""

    interface: str


class Hello(Strict, frozen=True):
    """The protocol that the peer speaks, and whether it gets what descriptors hold in the answer itself."""

    protocol: int
    inline: bool | None = None


class Wanted(Strict, frozen=True):
    """The generation of the Snapshot that the peer has, and the parts it wants."""

    known: int | None = None
    parts: tuple[Part, ...] | None = None


class Key(Strict, frozen=True):
    """What a PFN map is of: ``region:NAME`` or ``guest:NAME``; and the time until which it was recorded, if not now."""

    key: str
    at_ns: int | None = None


class Frame(Strict, frozen=True):
    """A page frame, by its number."""

    pfn: Annotated[int, msgspec.Meta(ge=0, lt=1 << 52)]


class Region(Strict, frozen=True):
    """A region, by its name."""

    region: str


class Place(Strict, frozen=True):
    """Which descriptor of the last answer is read, and from where."""

    fd: int
    at: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Applied(Strict, frozen=True):
    """An Action to apply."""

    action: dict[str, Any]


MOST_BEFORE = 256
"""Actions that one may be planned after: each is planned as well, and who may only look can ask for it."""


class Planned(Strict, frozen=True):
    """An Action to plan, and those that would be done before it."""

    action: dict[str, Any]
    after: Annotated[tuple[dict[str, Any], ...], msgspec.Meta(max_length=MOST_BEFORE)] | None = None


class After(Strict, frozen=True):
    """What is wanted comes after this: an event's number, or a time."""

    after: int | None = None


class At(Strict, frozen=True):
    """A time in the past, ns since the epoch."""

    at_ns: int


class Every(Strict, frozen=True):
    """How often a Snapshot is wanted, and its parts."""

    every_ms: int | None = None
    parts: tuple[Part, ...] | None = None
