"""An arena on this host: an ext4 of a loop device, taken as if it were dax, in this process and in others."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from memconsole.backend.stores import arena, dax, ext4, ranges
from memconsole.backend.stores.arena import Arena, ArenaRecord
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.stores.ranges import Range

M = 1 << 20
_mounted = arena.mounted


@contextlib.contextmanager
def images(place: Path, name: str, size: int = 96 * M) -> Iterator[Path]:
    """An arena's file system, mounted in a directory; a test is skipped where no loop device can be."""
    file, path = place / "image", place / "mnt"
    with file.open("wb") as new:
        new.truncate(size)
    path.mkdir()
    ext4.make(str(file), f"mc:{name}", size)
    mounted = subprocess.run(["mount", "-o", "loop", file, path], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no loop device can be mounted here: {mounted.stderr.strip()}")
    try:
        fd = os.open(path, os.O_RDONLY)
        arena.write_record(fd, ArenaRecord(name=name, host=arena.machine_id()))
        os.close(fd)
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def at(path: Path) -> Arena:
    """The arena of an image, as if it were dax."""
    (found,) = (each for each in _mounted() if each.path == path)
    return found._replace(trouble="")


def take_as_dax(path: Path) -> None:
    """Have this process know the arena of an image and no other, for good."""
    usable = (at(path),)
    arena.mounted = lambda *_: usable
    arena.mount_all = lambda *_: []


def take_as_devdax(file: Path) -> None:
    """Have this process know a file as the only device of memory that it has, for good; its regions are names of it."""
    device = Range("dax0.0", str(file), 0, file.stat().st_size, 0, 1 << 30)
    ranges.devdax = lambda *_: (device,)
    (PieceStore.__init__.__kwdefaults__ or {}).update(nodes=file.parent / "nodes", node=another_name)


def another_name(device: Range, path: Path) -> None:
    """A name of its own for a region, of the file that stands for its device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.hardlink_to(device.path)


def files(path: Path) -> list[str]:
    """What is in it, by name."""
    return sorted(each.name for each in path.iterdir() if each.is_file())


def empty(path: Path) -> None:
    """Throw away what is in it."""
    for each in path.iterdir():
        if each.is_file():
            dax._discard(each)
