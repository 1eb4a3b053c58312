"""Which boot a ledger means, and what is left of it in another one that memconsole did not make.

Inodes, processes and devices are those of one boot. Behind memconsole's own jump the ledger learns the new ones from
memconsole-resume (:mod:`.handoff.adopt`). Behind any other kexec a service manager may still have carried the memory:
systemd (261 and newer) preserves fd stores at an ordinary ``systemctl kexec``, and ends every process. Then

    region    known again by its name in custody and its size: a file handed over has another inode, and no name
    guest     ended with the kernel before; its grants stay, for whoever takes its place
    the rest  descriptors of processes and devices are not carried: custody has none of them any more
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from memconsole.backend.custody.names import custody_name
from memconsole.backend.kernel import host, tree
from memconsole.backend.ledger.state import EventRecord, Recorded, StateChange
from memconsole.backend.stores import files
from memconsole.model import Finding, GuestState, Region, RegionState, Severity

if TYPE_CHECKING:
    from pathlib import Path

    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.ledger.state import State

KEXEC = "was ended by a kexec that memconsole did not make"
"""What became of a guest; where a handoff of ours cannot be read, :data:`UNREAD`."""
UNREAD = "ended with the kernel before: a handoff landed, and what became of it cannot be read"


class BootHoldings(Protocol):
    """What is known of another boot: what the ledger means, what custody holds, and the tree of this host."""

    @property
    def state(self) -> State:
        """What the ledger means."""

    @property
    def custody(self) -> Custody:
        """Who holds the descriptors."""

    @property
    def root(self) -> Path:
        """Where the host's tree stands."""


def boot_id(root: tree.Root = "/") -> str:
    """The boot id of this kernel (/proc/sys/kernel/random/boot_id)."""
    return tree.line(root, "/proc/sys/kernel/random/boot_id")


def is_other_boot(holdings: BootHoldings) -> bool:
    """Whether the ledger means the processes and inodes of a kernel before this one; one that says nothing does not."""
    return holdings.state.boot not in {"", boot_id(holdings.root)}


def record_reboot(holdings: BootHoldings, why: str = KEXEC) -> Recorded[list[Finding]]:
    """In another boot than the ledger's: record what came through, and that its guests ended, all at once."""
    if not is_other_boot(holdings):
        return []
    _rescue_moves(holdings)
    state = holdings.state
    came = [region for region in regions_found(holdings) if region is not None]
    guests = tuple(
        replace(guest, pid=None, start_ticks=None, state=GuestState.GONE, ended=why)
        for guest in state.guests.values()
        if not guest.is_user
    )
    change = StateChange(
        regions=tuple(replace(region, state=RegionState.RESTORED) for region in came),
        guests=guests,
        grants=tuple(replace(grant, lazy=False) for grant in state.grants.values() if grant.lazy),
        without_quarantine=tuple(state.quarantine),
        boot=boot_id(holdings.root),
    )
    text = (
        f"this kernel was booted by a kexec that memconsole did not make: {_counted(len(came), 'region')} came through"
    )
    if guests:
        text += f", {', '.join(guest.name for guest in guests)} ended"
    yield EventRecord(time.time_ns(), "kexec", host.host(holdings.root).name, text, change=change)
    if not guests and not came:
        return []
    remedy = "memconsole handoff run boots another kernel and carries the guests too"
    return [Finding("kexec-foreign", Severity.WARNING, "host", text, "/proc/sys/kernel/random/boot_id", remedy)]


def regions_found(holdings: BootHoldings) -> Iterator[Region | None]:
    """Every region with the inodes its segments have now; None for one that custody lacks, or has in another size."""
    held = set(holdings.custody.names())
    for region in holdings.state.regions.values():
        names = [custody_name(region.name, index) for index in range(len(region.segments))]
        if not held.issuperset(names):
            yield None
            continue
        fds = [holdings.custody.get(name)[0] for name in names]
        try:
            found = files.segments(fds)
        finally:
            for fd in fds:
                os.close(fd)
        same = [each.size for each in found] == [each.size for each in region.segments]
        yield replace(region, segments=found) if same else None


def _rescue_moves(holdings: BootHoldings) -> None:
    """Of a move that was cut short (:mod:`.revoke.move`), keep the file that has the contents: not the emptied one."""
    for name in holdings.custody.names():
        kind, _, rest = name.partition(":")
        region_name, _, index = rest.rpartition(":")
        region = holdings.state.regions.get(region_name)
        if kind != "fresh" or region is None:
            continue
        fresh, payload = holdings.custody.get(name)
        old, _ = holdings.custody.get(custody_name(region_name, int(index)))
        try:
            size = region.segments[int(index)].size
            if os.fstat(old).st_size != size == os.fstat(fresh).st_size:
                holdings.custody.put(custody_name(region_name, int(index)), fresh, payload)
                holdings.custody.drop(name)
        finally:
            os.close(fresh)
            os.close(old)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
