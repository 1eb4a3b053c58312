"""What a Snapshot shows that no survey finds; who looks for it is made when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from memconsole.backend import needs
from memconsole.model import Part, Snapshot

# A Snapshot of an idle host needs none of these: they are imported where they are needed.
if TYPE_CHECKING:
    from memconsole.backend.observe.kho_preserved import KhoPreserved
    from memconsole.backend.observe.paging import PagingSurvey
    from memconsole.backend.observe.usage import Placement


class Additions:
    """What one control process adds to its Snapshots; any thread may ask for it."""

    def __init__(self, desk: needs.Borrowed, root: Path) -> None:
        self._desk = desk
        self._root = root
        self._making = threading.Lock()
        self._truth: KhoPreserved | None = None
        self._paging: PagingSurvey | None = None
        self._placement: Placement | None = None

    def with_paging(self, taken: Snapshot) -> Snapshot:
        """How the memory of guests is mapped, where there are any."""
        if not taken.guests:
            return taken
        from memconsole.backend.observe.paging import PagingSurvey

        with self._making:
            self._paging = self._paging or PagingSurvey(self._root)
        return self._paging.shown(taken)

    def with_truth(self, taken: Snapshot) -> Snapshot:
        """What KHO hands over of each region, where this kernel has it."""
        if not taken.survival.luo:
            return taken
        from memconsole.backend.observe.kho_preserved import KhoPreserved

        with self._making:
            self._truth = self._truth or KhoPreserved(self._desk)
        return self._truth.shown(taken)

    def with_parts(self, taken: Snapshot, parts: Collection[Part]) -> Snapshot:
        """What host, service and guests use, and where the memory of guests lies, for those who asked."""
        from memconsole.backend.observe import usage

        taken = usage.with_usage(taken, self._root)
        if Part.PLACEMENT not in parts:
            return taken
        with self._making:
            self._placement = self._placement or usage.Placement(self._root)
        return self._placement.shown(taken)

    def close(self) -> None:
        """Let go of what was made."""
        if self._placement is not None:
            self._placement.close()
