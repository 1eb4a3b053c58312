"""What changed between two Snapshots, and a Snapshot again from what changed.

A Delta names only fields of the Snapshot that differ. A field whose entities have a key (``KEYS``) travels as the
entities that are new or different and the keys of those that went; where that could not restore their order, and for
every other field, the whole value travels. ``apply(old, between(old, new)) == new``, always. What a newer service
sends of fields that are unknown here is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import msgspec

from memconsole import decoding, differ
from memconsole.errors import WireError
from memconsole.model import Snapshot, Value

# A row for a field that older clients know raises protocol.PROTOCOL: they would not know how to put it together.
KEYS: Mapping[str, str] = {
    "regions": "name",
    "guests": "name",
    "grants": "id",
    "devices": "bdf",
    "windows": "id",
    "domains": "group",
    "events": "seq",
    "tables": "key",
}


class Delta(Value, frozen=True):
    """``fields``: whole new values; ``changed``: entities by table; ``removed``: their keys, as text, by table."""

    fields: dict[str, Any] = msgspec.field(default_factory=dict)
    changed: dict[str, list[Any]] = msgspec.field(default_factory=dict)
    removed: dict[str, list[str]] = msgspec.field(default_factory=dict)


class Watched(Value, frozen=True, omit_defaults=True):
    """One piece of a stream of Snapshots: the whole, or what changed since the one of generation ``base``."""

    generation: int
    base: int | None = None
    snapshot: Snapshot | None = None
    changes: Delta | None = None


def advance(last: tuple[int, Snapshot] | None, piece: Watched) -> tuple[int, Snapshot]:
    """The generation and the whole Snapshot after a piece, from those before it.

    Raises:
        WireError: the piece does not follow.
    """
    if piece.snapshot is not None:
        return piece.generation, piece.snapshot
    if last is None or piece.base != last[0] or piece.changes is None:
        raise WireError(
            "the stream changes a snapshot that it did not send", "a part of the stream is missing", "connect again"
        )
    return piece.generation, apply(last[1], piece.changes)


def between(old: Snapshot, new: Snapshot) -> Delta:
    """What turns ``old`` into ``new``."""
    delta = Delta()
    for name, before, after in differ.unequal(old, new):
        if name not in KEYS or not _by_key(delta, name, before, after):
            delta.fields[name] = after
    return delta


def _by_key(delta: Delta, name: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Describe a table by its changed entities; false if that would lose their order or is no gain."""
    key = attrgetter(KEYS[name])
    found = differ.match([key(entity) for entity in before], [key(entity) for entity in after])
    if found is None or not found.in_order:
        return False
    changed = [after[now] for was, now in found.kept if before[was] != after[now]] + [after[at] for at in found.new]
    if len(changed) == len(after):
        return False
    if changed:
        delta.changed[name] = changed
    if found.gone:
        delta.removed[name] = [str(key(before[at])) for at in found.gone]
    return True


def apply(old: Snapshot, delta: Delta) -> Snapshot:
    """The Snapshot that ``delta`` makes of ``old``.

    Raises:
        WireError: the delta is not one of a Snapshot of this version.
    """
    try:
        values = {name: value for name, value in delta.fields.items() if name in _TYPES}
        for name in {*delta.changed, *delta.removed} & _TYPES.keys():
            key = KEYS[name]
            gone = set(delta.removed.get(name, ()))
            entities = {
                getattr(entity, key): entity for entity in getattr(old, name) if str(getattr(entity, key)) not in gone
            }
            entities.update((getattr(entity, key), entity) for entity in _read(name, delta.changed.get(name, [])))
            values[name] = tuple(entities.values())
        return msgspec.structs.replace(old, **{name: _read(name, value) for name, value in values.items()})
    except (KeyError, decoding.Undecodable) as error:
        why = error.why if isinstance(error, decoding.Undecodable) else str(error)
        raise WireError(
            "the stream has a change that cannot be read",
            why,
            "upgrade the older of client and service, then restart the service",
        ) from None


_TYPES: dict[str, Any] = {info.name: info.type for info in msgspec.structs.fields(Snapshot)}


def _read(name: str, value: Any) -> Any:
    """A field's value from JSON values; one that was read already passes through."""
    return decoding.convert(value, _TYPES[name], what=name)
