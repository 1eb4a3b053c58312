"""What changed between two JSON values, leaf by leaf, as a JSON value that is small and compresses well.

The deltas of :mod:`memconsole.backend.wire.delta` carry whole entities, which is quick to apply; on disk a
resident size that changes in each of a hundred regions must not cost a hundred regions (measured on such a host, both
deflated: 3,700 bytes a second by entity, 480 by leaf). Grammar of a delta::

    delta  = [value]                            the new value
           | number                             what an integer grew by
           | {field: delta ...}                 the fields of an object that changed
           | {"-": [index ...]                  the items of an array that went, by their index in the old one,
              "#": {index: delta ...}           those of the rest that changed, by their index in what was left,
              "+": [value ...]}                 and the items behind them that are new; each part may be missing
"""

from __future__ import annotations

from typing import Any

from memconsole.differ import match

_KEYS = ("id", "name", "seq", "bdf", "key", "number", "group", "source")
_LARGEST_STEP = 1 << 53


def between(old: Any, new: Any) -> Any:
    """What turns ``old`` into ``new``, which differ."""
    if type(old) is int and type(new) is int and abs(new - old) < _LARGEST_STEP:
        return new - old
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return {name: between(old[name], item) for name, item in new.items() if not _same(old[name], item)}
    if isinstance(old, list) and isinstance(new, list):
        return _between_lists(old, new)
    return [new]


def _same(old: Any, new: Any) -> bool:
    """Equal, and of one type down to the leaves where it matters: 1, 1.0 and true are three values in JSON."""
    if old is new:
        return True
    if type(old) is not type(new) or old != new:
        return False
    if isinstance(old, list):
        return all(map(_same, old, new))
    if isinstance(old, dict):
        return all(_same(item, new[name]) for name, item in old.items())
    return True


def _between_lists(old: list[Any], new: list[Any]) -> Any:
    old_keys, new_keys = _identities(old), _identities(new)
    if old_keys is None or new_keys is None:
        if len(old) != len(new):
            return [new]
        old_keys = new_keys = list(range(len(old)))
    found = match(old_keys, new_keys)
    if found is None or not found.in_order:
        return [new]
    changed = {str(m): between(old[n], new[m]) for n, m in found.kept if not _same(old[n], new[m])}
    parts = {"-": found.gone, "#": changed, "+": [new[at] for at in found.new]}
    return {name: part for name, part in parts.items() if part}


def _identities(items: list[Any]) -> list[Any] | None:
    """What tells the items of an array apart, or None if nothing does."""
    if not items or not all(isinstance(item, dict) for item in items):
        return None if items else []
    for key in _KEYS:
        found = [item.get(key) for item in items]
        if all(isinstance(value, str | int) for value in found) and len(set(found)) == len(found):
            return found
    return None


def apply(old: Any, delta: Any) -> Any:
    """The new value; what did not change is shared with ``old``, which stays as it was."""
    if isinstance(delta, list):
        return delta[0]
    if isinstance(old, dict):
        return {**old, **{name: apply(old[name], part) for name, part in delta.items()}}
    if isinstance(old, list):
        gone = set(delta.get("-", ()))
        items = [item for n, item in enumerate(old) if n not in gone] if gone else list(old)
        for index, part in delta.get("#", {}).items():
            items[int(index)] = apply(items[int(index)], part)
        return items + delta.get("+", [])
    return old + delta
