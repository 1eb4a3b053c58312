"""A host with one device of memory for tests of the stores whose regions are pieces of one: a file stands for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from memconsole.backend.stores.described import UNIT
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.stores.ranges import Range
from memconsole.model import Region, RegionState
from support import arenas
from support.desks import Desk
from support.trees import Tree

M, G = 1 << 20, 1 << 30
SIZE = 32 * M


class Host:
    """A host with one device, and control processes on it one after the other, or two at once."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        self.tree = Tree(directory / "host")
        self.tree.write("/etc/machine-id", "abc\n")
        self.nodes = directory / "nodes"
        path = directory / "dax0.0"
        with path.open("wb") as file:
            file.truncate(size)
        self.device = Range("dax0.0", str(path), 0, size, 0, G)
        self.stores: list[PieceStore] = []

    def lab(self) -> PieceStore:
        """A store whose arena ``lab`` is on the device."""
        made = self.store()
        made.create("lab", self.device)
        return made

    def store(self, *, lasting: bool = True) -> PieceStore:
        made = PieceStore(
            "devdax",
            lambda _: (self.device,),
            lasting=lasting,
            root=self.tree.root,
            nodes=self.nodes,
            node=arenas.another_name,
        )
        self.stores.append(made)
        return made

    def raw(self, at: int, size: int) -> bytes:
        with Path(self.device.path).open("rb") as file:
            file.seek(at)
            return file.read(size)

    def spoil(self, at: int, raw: bytes) -> None:
        with Path(self.device.path).open("r+b") as file:
            file.seek(at)
            file.write(raw)


@contextlib.contextmanager
def hosts(directory: Path) -> Iterator[Host]:
    """A host; its stores are closed with it."""
    made = Host(directory)
    yield made
    for store in made.stores:
        store.close()


def reserve(store: PieceStore, name: str, size: int = 2 * UNIT, *, described_too: bool = True) -> int:
    (fd,) = store.reserve_segments(name, size, 4096, None, prefault=False, promised=0)
    if described_too:
        store.describe([fd], region(name, size))
    return fd


def region(name: str, size: int = 2 * UNIT) -> Region:
    return Region(name, "devdax", size, 4096, RegionState.RESERVED)


def with_store(desk: Desk, host: Host) -> PieceStore:
    """A desk whose devdax store uses the host's device."""
    made = host.store()
    desk.__dict__["stores"] = {**desk.stores, "devdax": made}
    return made
