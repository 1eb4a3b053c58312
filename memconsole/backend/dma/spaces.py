"""The guests' address spaces: made with the first grant for a device, gone with the last one.

The kernel does not list what an address space maps, so nothing here does either: :meth:`Spaces.settle` unmaps whatever
lies between the grants that the ledger means, and closes the devices none of them names. It is called after every
action and every restart; between two steps of an action a device reaches at most what the action's plan says.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import msgspec

from memconsole.backend.dma import iommufd, vfio
from memconsole.backend.stores import memfd
from memconsole.errors import KernelRefused, NotFound, Refused
from memconsole.model import Access, Grant, Value

if TYPE_CHECKING:
    from memconsole.backend.desk import Desk

_END = (1 << 64) - (1 << 12)
_SPACE, _DEVICE = "iommu:", "vfio:"


class Space(Value, frozen=True):
    """A guest's address space as custody keeps it: the id it has in its iommufd."""

    guest: str
    space: int


class Attached(Value, frozen=True):
    """A device as custody keeps it: whose address space it is attached to."""

    bdf: str
    guest: str


class Spaces:
    """What one control process knows of the address spaces in custody; every method may be called from any thread."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._lock = threading.RLock()
        self._spaces: dict[str, int] = {}
        self._devices: dict[str, str] = {}

    @property
    def devices(self) -> Mapping[str, str]:
        """The guest each device is attached to, by BDF."""
        with self._lock:
            return dict(self._devices)

    def adopt(self) -> None:
        """Take over what custody holds; nothing about it changes.

        Raises:
            Gone: nobody has custody any more.
        """
        with self._lock:
            for name in self._desk.custody.names():
                kind = next((kind for kind in (_SPACE, _DEVICE) if name.startswith(kind)), None)
                if kind is None:
                    continue
                fd, payload = self._desk.custody.get(name)
                os.close(fd)
                if kind == _SPACE:
                    space = msgspec.json.decode(payload, type=Space)
                    self._spaces[space.guest] = space.space
                else:
                    attached = msgspec.json.decode(payload, type=Attached)
                    self._devices[attached.bdf] = attached.guest

    def attach(self, guest: str, bdf: str) -> None:
        """Attach a device to a guest's address space, and let it master the bus; nothing is mapped by this.

        Raises:
            Refused: it is attached to another guest's (``DeviceInUse``).
            NotFound, Denied, KernelRefused: it cannot be opened, confined or attached.
        """
        with self._lock, contextlib.ExitStack() as stack:
            owner = self._devices.get(bdf)
            if owner == guest:
                return
            if owner is not None:
                raise Refused(f"device {bdf} is guest {owner}'s", "", "revoke its grants", code="DeviceInUse")
            device = vfio.open_device(self._desk.root, bdf)
            stack.callback(os.close, device)
            if guest not in self._spaces:
                self._make(guest)
            with self._space(guest) as (fd, space):
                iommufd.bind(device, bdf, fd)
                iommufd.attach(device, space)
            vfio.enable(device)
            self._desk.custody.put(_DEVICE + bdf, device, msgspec.json.encode(Attached(bdf, guest)))
            self._devices[bdf] = guest

    def map(self, grant: Grant) -> None:
        """Let the devices of a grant's guest reach it, at its GPA.

        Raises:
            KernelRefused: the kernel will not (``IovaTaken``, ``BadIova``, ``NoMemory``).
            NotFound: the region's memory is lost, or no device is attached.
        """
        assert grant.gpa is not None  # noqa: S101 - the plan refuses such a grant
        index, offset = divmod(grant.offset, memfd.SEGMENT)
        with self._lock, self._space(grant.guest) as (fd, space), self._desk.borrowed(grant.region) as files:
            writable = grant.access is Access.RW
            iommufd.map_file(fd, space, iommufd.Mapping(files[index], offset, grant.length, grant.gpa, writable))

    def unmap(self, grant: Grant) -> None:
        """Take a grant from every device; when this returns, no device of its guest reaches it.

        What is not mapped, or in no address space that is left, need not be unmapped.

        Raises:
            KernelRefused: the kernel will not, and the devices still reach it.
        """
        assert grant.gpa is not None  # noqa: S101 - the plan refuses such a grant
        with self._lock:
            if grant.guest in self._spaces:
                with self._space(grant.guest) as (fd, space):
                    done = iommufd.unmap(fd, space, grant.gpa, grant.length)
                if done not in {0, grant.length}:
                    what = f"{done} of {grant.length} bytes of {grant.id} were unmapped"
                    raise KernelRefused("IOMMU_IOAS_UNMAP", 0, what=what)

    def settle(self) -> None:
        """Make the address spaces what the ledger means: whatever else they map or hold is let go.

        Raises:
            KernelRefused, Gone: that cannot be done.
        """
        with self._lock:
            for guest in list(self._spaces):
                grants = [grant for grant in self._desk.state.grants_of(guest=guest) if grant.dma is not None]
                with self._space(guest) as (fd, space):
                    for start, end in _gaps(grants):
                        iommufd.unmap(fd, space, start, end - start)
                meant = {grant.dma for grant in grants}
                for bdf in [bdf for bdf, owner in self._devices.items() if owner == guest and bdf not in meant]:
                    self._desk.custody.drop(_DEVICE + bdf)
                    del self._devices[bdf]
                if not grants:
                    self._desk.custody.drop(_SPACE + guest)
                    del self._spaces[guest]

    def _make(self, guest: str) -> None:
        fd = iommufd.create(self._desk.root)
        try:
            space = iommufd.make_space(fd)
            self._desk.custody.put(_SPACE + guest, fd, msgspec.json.encode(Space(guest, space)))
            self._spaces[guest] = space
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _space(self, guest: str) -> Iterator[tuple[int, int]]:
        """A guest's iommufd, closed again, and the id of its address space."""
        if guest not in self._spaces:
            raise NotFound(f"no device is attached for guest {guest}", "", "map with --dma BDF")
        fd, _ = self._desk.custody.get(_SPACE + guest)
        try:
            yield fd, self._spaces[guest]
        finally:
            os.close(fd)


def _gaps(grants: list[Grant]) -> Iterator[tuple[int, int]]:
    """The IOVA between grants: START, END."""
    at = 0
    for start, length in sorted((grant.gpa or 0, grant.length) for grant in grants):
        if start > at:
            yield at, start
        at = start + length
    yield at, _END
