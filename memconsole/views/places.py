"""Where one can be in the console: a view, and what it is about."""

from __future__ import annotations

from typing import NamedTuple

from memconsole.fields import TABLES
from memconsole.model import Snapshot

NAMED = ("regions", "guests", "grants", "windows", "devices")
"""Tables of what findings and events are about."""


class Place(NamedTuple):
    """Where one is: a numbered view, or the kind of a subject, and the subject."""

    view: str
    subject: str = ""


def place_of(snapshot: Snapshot | None, name: str) -> Place | None:
    """Where something stands that has this name in a Snapshot; None where nothing has it."""
    if snapshot is None:
        return None
    for table_id in NAMED:
        table, kind = TABLES[table_id], table_id.removesuffix("s")
        if any(table.key(item) == name for item in table.rows(snapshot)):
            return Place(kind, f"{kind}:{name}")
    return None
