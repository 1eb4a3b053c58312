"""What the ledger and custody have of an adopted guest: its name, a region for each block of its RAM, and grants."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence

from memconsole.backend import needs
from memconsole.backend.stores import adopted, files
from memconsole.backend.verbs.regions import custody_names
from memconsole.errors import GuestError
from memconsole.model import Access, Grant, GrantState, Guest, GuestState, Refusal, Region, RegionState
from memconsole.units import PAGE

_MOST = 40
"""Characters of a guest's name, so that those of its regions fit into one."""


def name_of(desk: needs.LedgerState, shown: Guest) -> str:
    """What a guest is called in the ledger: as its manager calls it, as far as names of files go."""
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", shown.name).lstrip("._-")[:_MOST] or "vm"
    if word not in desk.state.guests:
        return word
    own = shown.managed.uuid[:8] if shown.managed is not None else str(shown.pid)
    return f"{word[: _MOST - 9]}-{own}"


def guest_of(shown: Guest, name: str) -> Guest:
    """A VM that runs here without memconsole as the ledger has it."""
    return Guest(
        name,
        shown.kind,
        GuestState.RUNNING,
        shown.pid,
        shown.start_ticks,
        memory=shown.memory,
        command=shown.command,
        created_ns=time.time_ns(),
        managed=shown.managed,
        adopted=True,
    )


def left_over(desk: needs.LedgerState, shown: Guest, name: str) -> Refusal | None:
    """That regions of an earlier adoption have the names."""
    left = [each for each in desk.state.regions if each.startswith(f"{name}.")]
    if not left:
        return None
    what = f"guest {shown.name} was adopted before, and its RAM of then is still in custody"
    remedy = f"memconsole copy {left[0]} FILE keeps its contents, then memconsole release {left[0]}"
    return Refusal("NameTaken", what, f"regions: {', '.join(left)}", remedy)


def region_of(desk: needs.OwnRegionFds, name: str, fd: int, size: int, block: str) -> Region:
    """A block, by QEMU's name of it, as a region.

    Raises:
        GuestError: there is one of this name.
    """
    if name in desk.state.regions or custody_names(desk, name):
        remedy = f"memconsole copy {name} FILE keeps its contents, then memconsole release {name}"
        raise GuestError(f"RAM cannot become region {name}", "there is one already", remedy, code="NameTaken")
    return Region(
        name,
        adopted.NAME,
        size,
        PAGE,
        RegionState.RESERVED,
        created_ns=time.time_ns(),
        segments=files.segments([fd]),
        block=block,
    )


def grants_of(first: int, region: Region, guest: str, parts: Sequence[tuple[int, int, int]]) -> Iterator[Grant]:
    """A grant for each part of a block (address, offset, size), the first with this number."""
    for number, (gpa, offset, size) in enumerate(parts, first):
        length = min(size, region.size - offset)
        now = time.time_ns()
        yield Grant(
            f"g{number}", region.name, guest, offset, length, Access.RW, GrantState.MAPPED, gpa=gpa, created_ns=now
        )
