"""What one control process holds: custody, what the ledger means, and the regions' descriptors.

Nothing above it is known here. One thread at a time changes it (the control process's lock of actions); any number
look at it meanwhile, so the descriptors that lookers use are only taken away under ``_looking``. That is never held for
long: memory is freed outside of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from memconsole.errors import NotFound
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody
    from memconsole.backend.ledger.state import State
    from memconsole.extents import ExtentTable

MOUNT = "mount"
"""What the table of files on the mount is called in custody."""
LANDED = "landed"
"""What the record of a resume is called once a control process has used it: memconsole-resume then starts nothing."""


def custody_name(region: str, segment: int) -> str:
    """What a region's segment is called in custody."""
    return f"region:{region}:{segment}"


class Backing(NamedTuple):
    """One segment of a region as our own fd shows it (fstat, F_GET_SEALS, /proc/self/fd); sizes in bytes."""

    device: int
    inode: int
    size: int
    resident: int
    seals: tuple[str, ...]
    retrieved: bool = False


class Holdings:
    """The memory of one control process and what is known of it; ``root`` is where its host's tree stands."""

    def __init__(self, runtime_dir: Path, custody: Custody, state: Callable[[], State], root: Path = Path("/")) -> None:
        self.root = root
        self.runtime_dir = runtime_dir
        self.custody = custody
        self._state = state
        self._looking = threading.RLock()
        self._fds: dict[str, tuple[int, ...]] = {}

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
        from memconsole.extents import ExtentTable

        with self.borrowed_fds(region) as fds:
            return ExtentTable.scan_fd(fds[segment], self.state.regions[region].segments[segment].size)

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
        from memconsole.backend.stores import memfd

        if region in self._fds:
            with self.borrowed_fds(region) as fds:
                memfd.empty_segments(fds)
            self.close_fds(region)

    def backings(self) -> dict[str, tuple[Backing, ...]]:
        """Every region's segments as their fds show them."""
        if not self._fds:
            return {}
        from memconsole.backend.stores import memfd

        found = {}
        with self._looking:
            for name, fds in self._fds.items():
                stats = [os.fstat(fd) for fd in fds]
                found[name] = tuple(
                    Backing(
                        stat.st_dev,
                        stat.st_ino,
                        stat.st_size,
                        stat.st_blocks * 512,
                        memfd.seals(fd),
                        memfd.was_preserved(fd),
                    )
                    for fd, stat in zip(fds, stats, strict=True)
                )
        return found

    def promised_bytes(self) -> int:
        """Bytes of reserved base pages that have no frame yet: memory that is spoken for."""
        with self._looking:
            resident = {name: sum(os.fstat(fd).st_blocks * 512 for fd in fds) for name, fds in self._fds.items()}
        return sum(
            max(0, region.size - resident.get(region.name, 0))
            for region in self.state.regions.values()
            if region.page_size == PAGE
        )

    def close(self) -> None:
        """Close every region's fds; custody keeps what it holds."""
        for name in list(self._fds):
            self.close_fds(name)
