"""What one control process holds: custody, what the ledger means, and the regions' descriptors.

Nothing above it is known here. One thread at a time changes it (the control process's lock of actions); any number
look at it meanwhile, so the descriptors that lookers use are only taken away under ``_looking``. That is never held for
long: memory is freed outside of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memconsole.errors import NotFound

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.ledger.state import State
    from memconsole.backend.stores.base import Store, Stores
    from memconsole.backend.stores.noted import ArenaNotes
    from memconsole.extents import ExtentTable


class Backing(NamedTuple):
    """One segment of a region as our own fd shows it (fstat, F_GET_SEALS, /proc/self/fd); sizes in bytes."""

    device: int
    inode: int
    size: int
    resident: int
    seals: tuple[str, ...]
    retrieved: bool = False


class Holdings:
    """The memory of one control process and what is known of it; ``root`` is where its host's tree stands.

    ``raw``: where the ranges begin that the raw store may use, said before ``stores`` is first asked for.
    """

    def __init__(
        self,
        runtime_dir: Path,
        custody: Custody,
        state: Callable[[], State],
        root: Path = Path("/"),
        *,
        state_dir: Path | None = None,
    ) -> None:
        self.root = root
        self.raw: Sequence[int] = ()
        self.runtime_dir = runtime_dir
        self.custody = custody
        self._state = state
        self._state_dir = state_dir
        self._looking = threading.RLock()
        self._fds: dict[str, tuple[int, ...]] = {}

    @functools.cached_property
    def stores(self) -> Stores:
        """The stores of this host, by name."""
        from memconsole.backend.stores import memfd, ranges
        from memconsole.backend.stores.dax import DaxStore
        from memconsole.backend.stores.pieces import PieceStore
        from memconsole.backend.stores.raw import RawStore

        lasting = self.custody.survives
        return {
            memfd.NAME: memfd,
            DaxStore.NAME: DaxStore(self.runtime_dir, lasting=lasting, root=self.root),
            ranges.DEVDAX: PieceStore(ranges.DEVDAX, ranges.devdax, lasting=lasting, root=self.root),
            RawStore.NAME: RawStore(self.raw, lasting=lasting, root=self.root),
        }

    @functools.cached_property
    def noted(self) -> ArenaNotes | None:
        """Which arenas this host had; None in a process that keeps no state."""
        from memconsole.backend.stores.noted import ArenaNotes

        return ArenaNotes(self._state_dir, self.root) if self._state_dir is not None else None

    def store_of(self, region: str) -> Store:
        """The store of a region.

        Raises:
            Refused: it is of a store that this memconsole does not know. NotFound: there is no such region.
        """
        from memconsole.backend.stores import base

        state = self.state
        aims = (each for intent in state.unfinished.values() for each in intent.aims.regions if each.name == region)
        meant = state.regions.get(region) or next(aims, None)  # one that is being made has its memory before its record
        if meant is None:
            raise NotFound(f"there is no region {region}", "none has this name", "memconsole regions lists them")
        return base.named(self.stores, meant.store)

    @property
    def state(self) -> State:
        """What the ledger means now."""
        return self._state()

    def fds(self, region: str) -> tuple[int, ...]:
        """The segments' fds of a region.

        Raises:
            NotFound: nobody holds its memory any more.
        """
        fds = self._fds.get(region)
        if fds is None:
            raise NotFound(
                f"the memory of region {region} is lost",
                "custody does not hold it",
                "memconsole audit says what can still be kept",
            )
        return fds

    @contextlib.contextmanager
    def borrowed_fds(self, region: str) -> Iterator[tuple[int, ...]]:
        """Copies of a region's fds, for long looks that must not hold up anybody.

        Raises:
            NotFound: nobody holds its memory any more.
        """
        with contextlib.ExitStack() as stack:
            with self._looking:
                copies = tuple(os.dup(fd) for fd in self.fds(region))
            for fd in copies:
                stack.callback(os.close, fd)
            yield copies

    def segment_frames(self, region: str, segment: int) -> ExtentTable:
        """The frames of one segment of a region by its pages, which the caller closes.

        Raises:
            NotFound: its memory is lost. Denied, KernelRefused: they cannot be read.
        """
        with self.borrowed_fds(region) as fds:
            return self.store_of(region).frames(fds[segment], self.state.regions[region].segments[segment].size)

    def hold_region(self, region: str, fds: tuple[int, ...]) -> None:
        """Keep a region's fds."""
        with self._looking:
            self._fds[region] = fds

    def replace_segment(self, region: str, segment: int, fd: int) -> None:
        """Keep a duplicate of ``fd`` as a segment of a region, in the place of the fd held."""
        copy = os.dup(fd)
        with self._looking:
            fds = list(self._fds[region])
            os.close(fds[segment])
            fds[segment] = copy
            self._fds[region] = tuple(fds)

    def close_fds(self, region: str) -> None:
        """Close a region's fds; custody is another matter."""
        with self._looking:
            fds = self._fds.pop(region, ())
        for fd in fds:  # the last one of a region frees its memory, which takes its time
            os.close(fd)

    def holds_region(self, region: str) -> bool:
        """Whether a region's memory is held."""
        return region in self._fds

    def free_region(self, region: str) -> None:
        """Take a region's frames from everybody and close its fds; one whose memory is lost has nothing to free.

        Raises:
            KernelRefused: it is preserved for a kexec.
        """
        store = self.store_of(region)
        if region in self._fds:
            with self.borrowed_fds(region) as fds:
                store.empty_segments(fds)
            self.close_fds(region)
        store.discard(region)

    def backings(self) -> dict[str, tuple[Backing, ...]]:
        """Every region's segments as their fds show them."""
        if not self._fds:
            return {}
        from memconsole.backend.stores import files

        found = {}
        with self._looking:
            for name, fds in self._fds.items():
                seen = [os.fstat(fd) for fd in fds]
                found[name] = tuple(
                    Backing(
                        status.st_dev,
                        status.st_ino,
                        *self._sizes(name, index, status),
                        files.seals(fd),
                        files.was_preserved(fd),
                    )
                    for index, (fd, status) in enumerate(zip(fds, seen, strict=True))
                )
        return found

    def _sizes(self, region: str, index: int, found: os.stat_result) -> tuple[int, int]:
        """Bytes of a segment, and those that have frames; a device says neither of itself."""
        if not stat.S_ISCHR(found.st_mode):
            return found.st_size, found.st_blocks * 512
        meant = self.state.regions.get(region)
        size = sum(each.size for each in meant.segments[index : index + 1]) if meant is not None else 0
        return size, size

    def promised_bytes(self) -> int:
        """Bytes of reserved base pages that have no frame yet: memory that is spoken for."""
        with self._looking:
            resident = {name: sum(os.fstat(fd).st_blocks * 512 for fd in fds) for name, fds in self._fds.items()}
        return sum(
            store.promised_bytes(region, resident.get(region.name, 0))
            for region in self.state.regions.values()
            if (store := self.stores.get(region.store)) is not None
        )

    def close(self) -> None:
        """Close every region's fds; custody keeps what it holds."""
        for name in list(self._fds):
            self.close_fds(name)
        for store in self.stores.values():
            store.close()

    def describe_regions(self) -> None:
        """Have regions say of themselves what the ledger means now, where their memory can.

        Raises:
            KernelRefused: it cannot be written down.
        """
        for region in self.state.regions.values():
            if self.holds_region(region.name):
                self.store_of(region.name).describe(
                    self.fds(region.name), region, self.state.grants_of(region=region.name)
                )
