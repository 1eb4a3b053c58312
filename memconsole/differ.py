"""What differs between two Snapshots, told in one way for all that ask.

The entities of a table belong together by their keys (:func:`match`). Of that the views keep the objects that did not
change (:func:`settled`), ``diff`` names the fields that did (:func:`changes`), the wire sends the entities
(:mod:`memconsole.backend.wire.delta`), and the history what is different within them
(:mod:`memconsole.backend.history.json_delta`).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from memconsole.fields import TABLES
from memconsole.model import Snapshot, Value

KEYS: Mapping[str, Callable[[Any], str]] = {
    **{table.id: table.key for table in TABLES.values()},
    "iommus": lambda item: str(item.name),
    "dax": lambda item: str(item.name),
    "gaps": lambda item: str(item.source),
}
"""What tells the entities of a table of the Snapshot apart."""
_SINGLES = ("host", "memory", "survival")


class Match(NamedTuple):
    """How the items of two sequences belong together, by their places.

    ``gone``: in the first one only; ``kept``: in both, by their order in the second; ``new``: in the second one only.
    ``in_order``: the kept ones in the order of the first, with the new ones behind them, are the second.
    """

    gone: list[int]
    kept: list[tuple[int, int]]
    new: list[int]
    in_order: bool


def match(old: Sequence[Hashable], new: Sequence[Hashable]) -> Match | None:
    """The match of two sequences by the keys of their items; None where a key is there twice."""
    place = {key: at for at, key in enumerate(old)}
    present = set(new)
    if len(place) != len(old) or len(present) != len(new):
        return None
    kept = [(place[key], at) for at, key in enumerate(new) if key in place]
    in_order = all(at == row for row, (_, at) in enumerate(kept)) and all(
        before < after for (before, _), (after, _) in itertools.pairwise(kept)
    )
    return Match(
        [at for at, key in enumerate(old) if key not in present],
        kept,
        [at for at, key in enumerate(new) if key not in place],
        in_order,
    )


def unequal(old: Snapshot, new: Snapshot) -> Iterator[tuple[str, Any, Any]]:
    """The fields of the Snapshot that differ, with what they were and are."""
    for name in Snapshot.__struct_fields__:
        before, after = getattr(old, name), getattr(new, name)
        if before is not after and before != after:
            yield name, before, after


def matched(name: str, before: Sequence[Any], after: Sequence[Any]) -> Match | None:
    """The match of a table's entities; None where they have no keys of their own."""
    key = KEYS.get(name)
    return match([key(item) for item in before], [key(item) for item in after]) if key is not None else None


# --- for views ------------------------------------------------------------------------------------------------------


def settled(old: Snapshot | None, new: Snapshot) -> Snapshot:
    """The new Snapshot, made of the old one's objects where they are equal, so that views need compare identity only.

    O(entities): for a worker thread.
    """
    if old is None:
        return new
    kept: dict[str, Any] = {name: getattr(old, name) for name in Snapshot.__struct_fields__}
    for name, before, after in unequal(old, new):
        pairs = in_place(KEYS[name], before, after) if name in KEYS else None
        if pairs is None:
            found = matched(name, before, after)
            pairs = found.kept if found is not None else None
        items = list(after) if pairs is not None else []
        for was, now in pairs or ():
            if before[was] == after[now]:
                items[now] = before[was]
        kept[name] = after if pairs is None else tuple(items)
    return msgspec.structs.replace(new, **kept)


def in_place(
    key: Callable[[Any], str], before: Sequence[Any], after: Sequence[Any]
) -> Sequence[tuple[int, int]] | None:
    """The places of those that are other objects, where each has the place that it had; else None.

    Mostly few of thousands are, and then no key of the others is made.
    """
    if len(before) != len(after):
        return None
    others = list(itertools.compress(itertools.count(), map(operator.is_not, before, after)))
    if any(key(before[at]) != key(after[at]) for at in others):
        return None
    return [(at, at) for at in others]


# --- for people -----------------------------------------------------------------------------------------------------


class FieldChange(Value, frozen=True):
    """One difference between two Snapshots: an entity added or removed, or a field of it that changed."""

    kind: Literal["added", "removed", "changed"]
    table: str
    key: str
    field: str = ""
    old: Any = None
    new: Any = None


def changes(old: Snapshot, new: Snapshot) -> tuple[FieldChange, ...]:
    """What changed, by table, entity and field; a field inside another is ``seen.rss``. Events are not compared."""
    found: list[FieldChange] = []
    different = {name: (before, after) for name, before, after in unequal(old, new)}
    for name in (*_SINGLES, *KEYS):
        if name == "events" or name not in different:
            continue
        before, after = different[name]
        found += _fields(name, name, before, after) if name in _SINGLES else _entities(name, before, after)
    return tuple(found)


def _entities(table: str, before: Sequence[Any], after: Sequence[Any]) -> Iterator[FieldChange]:
    """Where a key is there twice, the last entity of it counts."""
    key = KEYS[table]
    was, now = ({key(item): item for item in items} for items in (before, after))
    found = match(list(was), list(now))
    names, later = list(was), list(now)
    if found is None:
        return
    yield from (FieldChange("removed", table, names[at]) for at in found.gone)
    yield from (FieldChange("added", table, later[at]) for at in found.new)
    for _, at in found.kept:
        if was[later[at]] != now[later[at]]:
            yield from _fields(table, later[at], was[later[at]], now[later[at]])


def _fields(table: str, key: str, old: Any, new: Any) -> Iterator[FieldChange]:
    before, after = _flat(old), _flat(new)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield FieldChange("changed", table, key, name, before.get(name), after.get(name))


def _flat(item: msgspec.Struct, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in msgspec.structs.fields(item):
        if info.name == "usage":  # counters that always run on, of those who asked for them
            continue
        value = getattr(item, info.name)
        if isinstance(value, msgspec.Struct):
            found.update(_flat(value, f"{prefix}{info.name}."))
        else:
            found[prefix + info.name] = msgspec.to_builtins(value)
    return found
