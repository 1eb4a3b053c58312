"""Fields that a newer version wrote and this one does not know: found where read, kept where rewritten.

A rest has the shape of the JSON it was left of: a dict of the fields that are unknown, or known and have a rest inside;
of a list :class:`Rests`. None: nothing was left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from memconsole import decoding
from memconsole.model import Value


class Rests(NamedTuple):
    """The rests of a list's elements, by where they stood; ``known``: what was known of all its elements."""

    by_place: dict[int, Any]
    known: list[Any]

    def place(self, at: int, now: list[Any]) -> int:
        """Where the element that stood ``at`` stands now: the same as it was, or changed in its place; -1: nowhere."""
        if at < len(self.known) and self.known[at] in now:
            return now.index(self.known[at])
        return at if at < len(now) and now[at] not in self.known else -1


def rest(raw: bytes, value: Value) -> Any:
    """What of the JSON in ``raw`` is not in the value that it was decoded to; None where nothing is."""
    known = msgspec.json.encode(value)
    return None if known == raw else _left(decoding.json(raw, what="a value"), decoding.json(known, what="a value"))


def encode(value: Value, left: Any) -> bytes:
    """A value as JSON, with a rest put back where it was."""
    known = msgspec.json.encode(value)
    return known if left is None else msgspec.json.encode(put_back(decoding.json(known, what="a value"), left))


def put_back(known: Any, left: Any) -> Any:
    """JSON values with a rest in its place again; what has no place any more is gone with it."""
    if isinstance(known, dict) and isinstance(left, dict):
        inside = {name: put_back(each, left.get(name)) for name, each in known.items()}
        return inside | {name: each for name, each in left.items() if name not in known}
    if isinstance(known, list) and isinstance(left, Rests):
        found = list(known)
        for at, each in left.by_place.items():
            if (place := left.place(at, known)) >= 0:
                found[place] = put_back(known[place], each)
        return found
    return known


def _left(said: Any, known: Any) -> Any:
    if isinstance(said, dict) and isinstance(known, dict):
        inside = {name: _left(each, known[name]) for name, each in said.items() if name in known}
        found = {name: each for name, each in inside.items() if each is not None}
        return found | {name: each for name, each in said.items() if name not in known} or None
    if isinstance(said, list) and isinstance(known, list):
        rests = {at: _left(*pair) for at, pair in enumerate(zip(said, known, strict=False))}
        by_place = {at: each for at, each in rests.items() if each is not None}
        return Rests(by_place, known) if by_place else None
    return None
