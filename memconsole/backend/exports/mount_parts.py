"""Entries of the mount's tree, as what makes them, and the memfds that its files show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memconsole.backend.exports.mapped import path_of_file, user_files
from memconsole.errors import MemconsoleError
from memconsole.model import Finding, Region, Severity

if TYPE_CHECKING:
    from memconsole.backend.exports.fuse import FuseTree
    from memconsole.backend.ledger.state import State


def directory(tree: FuseTree, path: str) -> Callable[[int, int], object]:
    """What makes a directory, of a user and with a mode."""
    return lambda uid, mode: tree.directory(path, uid, mode=mode)


def above(state: State) -> list[str]:
    """The directories that users' files lie in, each before those in it."""
    paths = [Path(path_of_file(file)) for file in user_files(state).values()]
    return sorted({"files", *(str(each) for path in paths for each in path.parents if each != Path())})


def link(tree: FuseTree, guest: str, bdf: str, bar: int) -> Callable[[int, int], object]:
    """What makes the link to the resource file of a device's BAR."""
    target = Path(f"/sys/bus/pci/devices/{bdf}/resource{bar}")
    return lambda _uid, _mode: tree.link_window(guest, bdf, bar, target)


def memfd(region: Region) -> tuple[int, int]:
    """The device and inode of a region's first segment."""
    return region.segments[0].device, region.segments[0].inode


def memfds(state: State) -> dict[str, tuple[int, int]]:
    """The memfd of every region that has one segment, and so can be a file."""
    return {region.name: memfd(region) for region in state.regions.values() if len(region.segments) == 1}


def stale_finding(subject: str, error: MemconsoleError) -> Finding:
    """That an entry, or all of the mount, does not show what the ledger means."""
    what = f"the mount is out of date: {error.what}"
    remedy = (
        error.remedy
        or "nothing need be done at once: what is mapped stays mapped, and the fd export works; see the log"
    )
    return Finding("mount-behind", Severity.ERROR, subject, what, error.why, remedy)
