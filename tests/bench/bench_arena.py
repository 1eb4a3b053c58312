"""An arena: its files cut against memfds, touched through the mount against themselves, and found again by a scan."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import msgspec
from harness import Result, Skip, best
from labs import said

from memconsole.backend.stores import arena, ext4
from memconsole.backend.stores.arena import RegionRecord
from memconsole.backend.stores.dax import DaxStore
from memconsole.model import Region, RegionState

M = 1 << 20
REGIONS = 1000
ROUNDS = 3
WORDS = "kho=off liveupdate=off memmap=1280M!4G"


def bench_cut() -> list[Result]:
    """A file of 1 GiB cut while a process maps all of it, and first touches, in the lab: there is no pmem elsewhere."""
    cut, touch = said("arena_cost", "cost", "1024", str(ROUNDS), memory="4G", append=WORDS)
    name = "first touch of 1G of an arena through the mount, against the plain file"
    return [
        Result("cut of 1G of an arena, against a memfd's", least(cut["ours_ns"]), "ms", least(cut["floor_ns"]), 0.05),
        Result(name, least(touch["ours_ns"]), "ms", least(touch["floor_ns"]), 1.05),
    ]


def least(took: list[int]) -> float:
    """The fewest of some nanoseconds, in ms."""
    return min(took) / 1e6


def bench_scan() -> list[Result]:
    """1,000 regions found by what their files say, against the same files opened and asked for their attribute.

    The file system is that of an arena, on a loop device: a scan reads no frame.
    """
    if os.geteuid() != 0:
        raise Skip("needs root, to mount a file system")
    from support import arenas

    with (
        tempfile.TemporaryDirectory(prefix="mc-bench-") as place,
        arenas.images(Path(place), "bench", 2304 * M) as path,
    ):
        usable = (arenas.at(path),)
        with mock.patch.multiple(arena, mounted=lambda *_: usable, mount_all=lambda *_: []):
            store = DaxStore(Path(place), lasting=True)
            for index in range(REGIONS):
                made(path / f"region-{index}")
            asked = best(lambda: ask(path))
            took = best(lambda: scan(store))
            store.close()
    name = f"scan of an arena with {REGIONS:,} regions"
    return [Result(name, took / 1e6, "ms", asked / 1e6, 1000, absolute=True)]


def made(path: Path) -> None:
    """A region's file, as a reservation leaves it but for zeros."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        ext4.allocate(fd, 2 * M)
        record = RegionRecord(region=Region(path.name, "dax", 2 * M, 4096, RegionState.RESERVED))
        os.setxattr(fd, arena.XATTR, msgspec.json.encode(record))
    finally:
        os.close(fd)


def ask(path: Path) -> None:
    """Every file opened, and its attribute read."""
    for entry in os.scandir(path):
        if entry.is_file():
            fd = os.open(entry.path, os.O_RDWR)
            os.getxattr(fd, arena.XATTR)
            os.close(fd)


def scan(store: DaxStore) -> None:
    """What ``arena scan`` does before custody gets what it found."""
    found, told = store.found(())
    assert len(found) == REGIONS, told
    for each in found:
        for fd in each.fds:
            os.close(fd)
