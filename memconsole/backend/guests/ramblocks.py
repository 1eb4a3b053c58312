"""A block of a guest's RAM under its three names: QEMU's, its migration stream's, and the region's.

ram-node0               what QEMU calls the memory backend (query-memdev)
/objects/ram-node0      what it calls the block, in the stream too, from machine types 4.0 on (info ramblock)
web.ram-node0           the region that it is
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

from memconsole import decoding
from memconsole.backend.managers.guest_memory import Ask, file_name
from memconsole.backend.managers.migration import Elsewhere
from memconsole.errors import GuestError
from memconsole.model.base import Value

_ROW = re.compile(r"\s*(\S+)\s+\d+ \S+\s+0x[0-9a-f]+\s", re.ASCII)
_MOST = 14
"""Characters of a block's name in the name of its region, which fits into those of custody."""


class StreamBlock(Value, frozen=True):
    """A block that is held elsewhere than in the stream: its names in QEMU and in the stream, region and bytes."""

    name: str
    region: str
    size: int
    stream: str = ""

    @property
    def file(self) -> str:
        """What libvirt calls the block in the directory it makes for RAM."""
        return file_name(self.name)

    def elsewhere(self, fd: int = -1) -> Elsewhere:
        """It, as a stream need not bring it; what comes of it goes to ``fd``."""
        return Elsewhere(self.stream or self.name, self.size, fd)


def region_name(guest: str, block: str) -> str:
    """What the region of a guest's block is called; of a name that is cut, a digest keeps it apart from others."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", block)
    if len(word) > _MOST:
        word = f"{word[: _MOST - 5]}-{hashlib.sha256(block.encode()).hexdigest()[:4]}"
    return f"{guest}.{word}"


def stream_names(ask: Ask) -> frozenset[str]:
    """What the migration stream of a QEMU calls blocks.

    Raises:
        GuestError: it does not answer. Undecodable: its answer is none.
    """
    said: Any = ask("human-monitor-command", {"command-line": "info ramblock"})
    rows = map(_ROW.match, decoding.convert(said, str, what="QEMU's answer to info ramblock").splitlines())
    return frozenset(row[1] for row in rows if row is not None)


def stream_name(guest: str, block: str, names: Collection[str]) -> str:
    """What the migration stream calls a memory backend's block, of the names that there are.

    Raises:
        GuestError: none is its.
    """
    found = next((name for name in (block, f"/objects/{block}") if name in names), None)
    if found is None:
        why = "info ramblock does not name it"
        raise GuestError(f"block {block} of guest {guest} is not known", why, "report it, with QEMU's version")
    return found
