"""What changed between two Snapshots, and a Snapshot again from what changed.

A Delta names only fields of the Snapshot that differ. A field whose entities have a key (``KEYS``) travels as the
entities that are new or different and the keys of those that went; where that could not restore their order, and for
every other field, the whole value travels. ``apply(old, between(old, new)) == new``, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from memconsole.errors import WireError
from memconsole.model import Snapshot, Value

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


class Delta(Value, frozen=True, omit_defaults=True):
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
        raise WireError("a change of a snapshot that is not there", "the service left a piece of its stream out")
    return piece.generation, apply(last[1], piece.changes)


def between(old: Snapshot, new: Snapshot) -> Delta:
    """What turns ``old`` into ``new``."""
    delta = Delta()
    for name in Snapshot.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if before is after or before == after:
            continue
        key = KEYS.get(name)
        if key is None or not _by_key(delta, name, key, before, after):
            delta.fields[name] = after
    return delta


def _by_key(delta: Delta, name: str, key: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Describe a table by its changed entities; false if that would lose their order or is no gain."""
    old = {getattr(entity, key): entity for entity in before}
    new = {getattr(entity, key): entity for entity in after}
    if len(old) != len(before) or len(new) != len(after):
        return False
    changed = [entity for at, entity in new.items() if at not in old or old[at] != entity]
    removed = [str(at) for at in old if at not in new]
    if len(changed) == len(after) or _order(old, changed, key, set(removed)) != list(new):
        return False
    if changed:
        delta.changed[name] = changed
    if removed:
        delta.removed[name] = removed
    return True


def _order(old: Mapping[Any, Any], changed: list[Any], key: str, removed: set[str]) -> list[Any]:
    kept = [at for at in old if str(at) not in removed]
    return kept + [at for at in (getattr(entity, key) for entity in changed) if at not in old]


def apply(old: Snapshot, delta: Delta) -> Snapshot:
    """The Snapshot that ``delta`` makes of ``old``.

    Raises:
        WireError: the delta is not one of a Snapshot of this version.
    """
    try:
        values: dict[str, Any] = {**delta.fields}
        for name in {*delta.changed, *delta.removed}:
            key = KEYS[name]
            gone = set(delta.removed.get(name, ()))
            entities = {
                getattr(entity, key): entity for entity in getattr(old, name) if str(getattr(entity, key)) not in gone
            }
            entities.update((getattr(entity, key), entity) for entity in _read(name, delta.changed.get(name, [])))
            values[name] = tuple(entities.values())
        return msgspec.structs.replace(old, **{name: _read(name, value) for name, value in values.items()})
    except (KeyError, msgspec.ValidationError) as error:
        raise WireError("a change of a snapshot that cannot be read", str(error), "is the service as old?") from None


_TYPES = {info.name: info.type for info in msgspec.structs.fields(Snapshot)}


def _read(name: str, value: Any) -> Any:
    """A field's value from JSON values; one that was read already passes through."""
    return msgspec.convert(value, type=_TYPES[name])
