"""Snapshots that an older memconsole recorded, in the form that this one reads.

A version of the format renames fields; what else it adds has defaults. A path leads through objects and lists to the
objects that have the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from memconsole.model import SNAPSHOT_VERSION


class Renamed(NamedTuple):
    """A field of the objects at ``path`` that a version calls by another name."""

    path: tuple[str, ...]
    old: str
    new: str


RENAMED: Mapping[int, Sequence[Renamed]] = {
    2: (Renamed(("findings",), "what", "observed"),),
}
"""What each version renamed, by its number."""


def upgraded(document: Any) -> Any:
    """The JSON of a Snapshot in the form of this version; one that is of it, or is none at all, stays as it is."""
    version = document.get("version") if isinstance(document, dict) else None
    if not isinstance(version, int) or not 0 < version < SNAPSHOT_VERSION:
        return document
    for later in range(version + 1, SNAPSHOT_VERSION + 1):
        for each in RENAMED.get(later, ()):
            document = _renamed(document, each.path, each)
    return {**document, "version": SNAPSHOT_VERSION}


def _renamed(value: Any, path: Sequence[str], change: Renamed) -> Any:
    if isinstance(value, list):
        return [_renamed(each, path, change) for each in value]
    if not isinstance(value, dict):
        return value
    if path:
        return {name: _renamed(each, path[1:], change) if name == path[0] else each for name, each in value.items()}
    return {change.new if name == change.old else name: each for name, each in value.items()}
