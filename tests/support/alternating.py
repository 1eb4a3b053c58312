"""A host where something goes on, for benches: between each look and the next."""

from __future__ import annotations

from collections.abc import Collection

from memconsole.model import Part, Snapshot
from support.synthetic import SyntheticSource


class AlternatingSource(SyntheticSource):
    """Of two Snapshots each time the other, as a host has them where something goes on."""

    other: Snapshot

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        """That of the two which was not asked for last."""
        now = super().snapshot(parts)
        self.show(self.other)
        self.other = now
        return now
