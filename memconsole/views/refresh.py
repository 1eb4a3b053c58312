"""From one Snapshot to the next: what did not change stays the same object, so views need only compare identity."""

from __future__ import annotations

from typing import Any

import msgspec

from memconsole.fields import TABLES
from memconsole.model import Snapshot

_KEYS = {name: table.key for name, table in TABLES.items()}


def settle(old: Snapshot | None, new: Snapshot) -> Snapshot:
    """The new Snapshot, made of the old one's objects wherever they are equal; O(entities), for a worker thread."""
    if old is None:
        return new
    kept: dict[str, Any] = {}
    for name in Snapshot.__struct_fields__:
        was, now = getattr(old, name), getattr(new, name)
        if was == now:
            kept[name] = was
        elif name in _KEYS:
            key = _KEYS[name]
            known = {key(item): item for item in was}
            kept[name] = tuple(
                same if (same := known.get(key(item))) is not None and same == item else item for item in now
            )
    return msgspec.structs.replace(new, **kept)
