"""The guests' address spaces: made with the first grant for a device, gone with the last one.

The kernel does not list what an address space maps, so nothing here does either: :meth:`AddressSpaces.reconcile` unmaps
whatever lies between the grants that the ledger means, and closes the devices none of them names. It is called after
every action and every restart; between two steps of an action a device reaches at most what the action's plan says.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memconsole.backend.custody import payloads
from memconsole.backend.dma import backends, vfio, vmm_detach
from memconsole.backend.dma.backends import SpaceKind
from memconsole.backend.dma.iommufd import Mapping as Range
from memconsole.backend.kernel import tree
from memconsole.backend.stores import files
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.model import Access, Finding, Grant, Value

if TYPE_CHECKING:
    from memconsole.backend.holdings import Holdings

_END = (1 << 64) - (1 << 12)
_SPACE, _DEVICE, _GROUP = "iommu:", "vfio:", "group:"


def custody_names(guest: str, devices: Sequence[str]) -> list[str]:
    """What a guest's address space and its devices are called in custody; nothing where it has none."""
    return [_SPACE + guest, *(_DEVICE + bdf for bdf in sorted(devices))] if devices else []


class AddressSpace(Value, frozen=True):
    """A guest's address space as custody keeps it: the id it has in its fd, and what it is made of."""

    guest: str
    space: int
    kind: SpaceKind = SpaceKind.IOMMUFD


class AttachedDevice(Value, frozen=True):
    """A device as custody keeps it: whose address space it is attached to, and the IOMMU group it came out of.

    ``quiet``: the bus was taken from it.
    """

    bdf: str
    guest: str
    group: int | None = None
    quiet: bool = False


class AddressSpaces:
    """What one control process knows of the address spaces in custody; every method may be called from any thread."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._lock = threading.RLock()
        self._spaces: dict[str, AddressSpace] = {}
        self._devices: dict[str, str] = {}
        self._groups: dict[str, int] = {}
        self._joined: set[int] = set()
        self._quiet: set[str] = set()

    @property
    def quiesced(self) -> frozenset[str]:
        """The devices from which the bus was taken, by BDF."""
        with self._lock:
            return frozenset(self._quiet)

    @property
    def devices(self) -> Mapping[str, str]:
        """The guest each device is attached to, by BDF."""
        with self._lock:
            return dict(self._devices)

    @property
    def vmm_filled(self) -> frozenset[str]:
        """The guests whose VMM fills their address space."""
        with self._lock:
            return frozenset(guest for guest, space in self._spaces.items() if space.kind is SpaceKind.VMM)

    def adopt(self) -> list[Finding]:
        """Take over what custody holds; nothing about it changes, and what cannot be read is a finding.

        Raises:
            Gone: nobody has custody any more.
        """
        found = []
        with self._lock:
            for name in self._holdings.custody.names():
                try:
                    self._adopt(name)
                except BadFile as error:
                    found.append(payloads.unknown(name, error))
        return found

    def _adopt(self, name: str) -> None:
        kind = next((kind for kind in (_SPACE, _DEVICE, _GROUP) if name.startswith(kind)), None)
        if kind == _GROUP:
            number = name.removeprefix(_GROUP)
            if not number.isdecimal():
                raise BadFile(
                    f"custody holds {name}, which is no IOMMU group",
                    "a group is a number",
                    "end the program that stored it",
                )
            self._joined.add(int(number))
        if kind in {None, _GROUP}:
            return
        if kind == _SPACE:
            space = payloads.held(self._holdings.custody, name, AddressSpace)
            self._spaces[space.guest] = space
            return
        attached = payloads.held(self._holdings.custody, name, AttachedDevice)
        self._devices[attached.bdf] = attached.guest
        if attached.group is not None:
            self._groups[attached.bdf] = attached.group
        if attached.quiet:
            self._quiet.add(attached.bdf)

    def attach(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        """Attach a device to a guest's address space, and unless ``quiet`` let it master the bus; nothing is mapped.

        Raises:
            Refused: it is attached to another guest's (``DeviceInUse``).
            NotFound, Denied, KernelRefused: it cannot be opened, confined or attached.
        """
        with self._lock, contextlib.ExitStack() as stack:
            if not self._is_free(guest, bdf):
                return
            if guest not in self._spaces:
                self._make(guest, backends.choose_backend(self._holdings.root, bdf))
            fd, space = stack.enter_context(self._space(guest))
            number = None
            if space.kind is SpaceKind.TYPE1:
                number = int(tree.link_name(self._holdings.root, f"/sys/bus/pci/devices/{bdf}/iommu_group") or -1)
            group = None if number is None else stack.enter_context(self._group(number, fd))
            device = backends.opened(space.kind, fd, space.space).attach(self._holdings.root, bdf, group)
            stack.callback(os.close, device)
            vfio.enable(device, master=not quiet)
            self._keep(AttachedDevice(bdf, guest, number, quiet), device)

    def hand_device(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        """Open a device, and an iommufd for it, for a guest whose VMM confines it: :meth:`handed_devices` has both.

        ``quiet``: it is known as quiet until :meth:`restart`; who starts it is its guest.

        Raises:
            Refused: it is attached to another guest's (``DeviceInUse``).
            NotFound, Denied, KernelRefused: it cannot be opened.
        """
        with self._lock:
            if not self._is_free(guest, bdf):
                return
            device = vfio.open_device(self._holdings.root, bdf)
            try:
                if guest not in self._spaces:
                    self._make(guest, SpaceKind.VMM)
                self._keep(AttachedDevice(bdf, guest, quiet=quiet), device)
            finally:
                os.close(device)

    def close(self, guest: str) -> None:
        """Close what a guest was handed whose VMM is gone: QEMU binds a device once for each opening of its file."""
        with self._lock:
            if guest in self._spaces:
                for bdf in [bdf for bdf, owner in self._devices.items() if owner == guest]:
                    self._drop(bdf)
                self._holdings.custody.drop(_SPACE + guest)
                del self._spaces[guest]

    @contextlib.contextmanager
    def handed_devices(self, guest: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The iommufd of a guest whose VMM confines its devices, and these, by BDF; closed again.

        Raises:
            NotFound: it has none.
        """
        with self._lock, contextlib.ExitStack() as stack:
            fd, _ = stack.enter_context(self._space(guest))
            devices = []
            for bdf in sorted(bdf for bdf, owner in self._devices.items() if owner == guest):
                devices.append(self._holdings.custody.get(_DEVICE + bdf)[0])
                stack.callback(os.close, devices[-1])
            yield fd, tuple(devices)

    @contextlib.contextmanager
    def window_region(self, guest: str, bdf: str, number: int) -> Iterator[tuple[int, vfio.VfioRegion] | None]:
        """A BAR of a device as its file has it, closed again; None where the guest's device cannot be mapped so.

        Raises:
            KernelRefused: the device does not say.
        """
        with self._lock:
            if self._devices.get(bdf) != guest or guest in self.vmm_filled:
                yield None
                return
            device, _ = self._holdings.custody.get(_DEVICE + bdf)
            try:
                region = vfio.region(device, number)
                yield (device, region) if region.mappable else None
            finally:
                os.close(device)

    def quiesce(self, bdf: str) -> None:
        """Take the bus from a device that is attached; :meth:`restart` gives it back.

        Raises:
            NotFound: nobody holds it. KernelRefused: it cannot be quiesced, and goes on.
        """
        with self._lock, self._device(bdf) as device:
            self._keep(self._attached(bdf, quiet=True), device)  # first: whoever dies here must be known to have begun
            try:
                vfio.quiesce(device)
            except KernelRefused:
                with contextlib.suppress(KernelRefused):
                    vfio.enable(device)
                self._keep(self._attached(bdf), device)
                raise

    def restart(self, bdf: str) -> None:
        """Let a device that was quiesced master the bus again; where a VMM has it, that is for its guest to do.

        Raises:
            NotFound: nobody holds it. KernelRefused: its configuration space cannot be reached.
        """
        with self._lock, self._device(bdf) as device:
            if self._devices[bdf] not in self.vmm_filled:
                vfio.enable(device)
            self._keep(self._attached(bdf), device)

    @contextlib.contextmanager
    def borrowed_fds(self, bdf: str) -> Iterator[tuple[int, int]]:
        """A device's file and that of its guest's address space, closed again.

        Raises:
            NotFound: nobody holds it.
        """
        with self._lock, self._device(bdf) as device, self._space(self._devices[bdf]) as (fd, _):
            yield device, fd

    def map(self, grant: Grant) -> None:
        """Let the devices of a grant's guest reach it, at its GPA.

        Raises:
            KernelRefused: the kernel will not (``IovaTaken``, ``BadIova``, ``NoMemory``).
            NotFound: the region's memory is lost, or no device is attached.
        """
        assert grant.gpa is not None  # noqa: S101 - the plan refuses such a grant
        index, offset = divmod(grant.offset, files.SEGMENT)
        with self._lock, self._space(grant.guest) as (fd, space), self._holdings.borrowed_fds(grant.region) as fds:
            want = Range(fds[index], offset, grant.length, grant.gpa, grant.access is Access.RW)
            backends.opened(space.kind, fd, space.space).map(want)

    def unmap(self, grant: Grant) -> None:
        """Take a grant from every device; when this returns, no device of its guest reaches it.

        What is not mapped, or in no address space that is left, need not be unmapped.

        Raises:
            KernelRefused: the kernel will not, and the devices still reach it.
        """
        assert grant.gpa is not None  # noqa: S101 - the plan refuses such a grant
        with self._lock:
            if grant.guest not in self._spaces:
                return
            if self._spaces[grant.guest].kind is SpaceKind.VMM:  # where it mapped what, it alone knows
                self._drop_space(grant.guest)
                return
            with self._space(grant.guest) as (fd, space):
                done = backends.opened(space.kind, fd, space.space).unmap(grant.gpa, grant.length)
            if done not in {0, grant.length}:
                what = f"{done} of {grant.length} bytes of {grant.id} were unmapped"
                raise KernelRefused(f"unmapping with {space.kind}", 0, what=what)

    def reconcile(self) -> None:
        """Make the address spaces what the ledger means: whatever else they map or hold is let go.

        A device of which the guest has a window stays attached; without grants it reaches nothing.

        Raises:
            KernelRefused, Gone: that cannot be done.
        """
        with self._lock:
            for guest in list(self._spaces):
                grants = [grant for grant in self._holdings.state.grants_of(guest=guest) if grant.dma is not None]
                meant = {grant.dma for grant in grants}
                if self._spaces[guest].kind is SpaceKind.VMM:
                    if guest in self._holdings.state.guests:  # as long as it lives it has what it was handed
                        if not grants:
                            self._drop_space(guest)
                        continue
                else:
                    with self._space(guest) as (fd, space):
                        backend = backends.opened(space.kind, fd, space.space)
                        for start, end in _gaps(grants):
                            backend.unmap(start, end - start)
                self._detach_unneeded(guest, {bdf for bdf, owner in self._devices.items() if owner == guest} - meant)
                if not grants and guest not in self._devices.values():
                    self._holdings.custody.drop(_SPACE + guest)
                    del self._spaces[guest]
            for number in self._joined - set(self._groups.values()):
                self._holdings.custody.drop(f"{_GROUP}{number}")
                self._joined.discard(number)

    def _detach_unneeded(self, guest: str, devices: set[str]) -> None:
        """Devices no grant is for; a window may be a part of a device's file, which is attached once."""
        windows = self._holdings.state.windows.values()
        windowed = {window.window.rpartition(":")[0] for window in windows if window.guest == guest}
        for bdf in devices - windowed:
            self._drop(bdf)
        for bdf in devices & windowed & self._quiet:
            self.restart(bdf)

    def _is_free(self, guest: str, bdf: str) -> bool:
        """Whether a device is nobody's; false if it is this guest's already.

        Raises:
            Refused: it is another guest's.
        """
        owner = self._devices.get(bdf)
        if owner not in {None, guest}:
            raise Refused(f"device {bdf} is in use", f"guest {owner} has it", "revoke its grants", code="DeviceInUse")
        return owner is None

    def _keep(self, attached: AttachedDevice, device: int) -> None:
        payloads.put(self._holdings.custody, _DEVICE + attached.bdf, device, attached)
        self._devices[attached.bdf] = attached.guest
        (self._quiet.add if attached.quiet else self._quiet.discard)(attached.bdf)
        if attached.group is not None:
            self._groups[attached.bdf] = attached.group

    def _attached(self, bdf: str, *, quiet: bool = False) -> AttachedDevice:
        return AttachedDevice(bdf, self._devices[bdf], self._groups.get(bdf), quiet)

    def _drop(self, bdf: str) -> None:
        self._holdings.custody.drop(_DEVICE + bdf)
        del self._devices[bdf]
        self._groups.pop(bdf, None)
        self._quiet.discard(bdf)

    def _drop_space(self, guest: str) -> None:
        with self.handed_devices(guest) as (fd, devices):
            vmm_detach.cut(fd, devices)

    @contextlib.contextmanager
    def _group(self, number: int, container: int) -> Iterator[int]:
        """An IOMMU group's file, closed again; with its first device it comes into the container, and custody."""
        name = f"{_GROUP}{number}"
        if number in self._joined:
            fd, _ = self._holdings.custody.get(name)
        else:
            fd = backends.join(self._holdings.root, number, container)
        try:
            if number not in self._joined:
                self._holdings.custody.put(name, fd)
                self._joined.add(number)
            yield fd
        finally:
            os.close(fd)

    def _make(self, guest: str, kind: SpaceKind) -> None:
        fd, id = backends.create(self._holdings.root, kind)
        try:
            space = AddressSpace(guest, id, kind)
            payloads.put(self._holdings.custody, _SPACE + guest, fd, space)
            self._spaces[guest] = space
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _device(self, bdf: str) -> Iterator[int]:
        """A device's file, closed again."""
        if bdf not in self._devices:
            raise NotFound(
                f"device {bdf} is not in custody",
                "it was never attached, or is detached",
                f"map a region with --dma {bdf}",
            )
        fd, _ = self._holdings.custody.get(_DEVICE + bdf)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _space(self, guest: str) -> Iterator[tuple[int, AddressSpace]]:
        """The fd of a guest's address space, closed again, and what custody knows of it."""
        if guest not in self._spaces:
            raise NotFound(f"guest {guest} has no device", "none was attached", "map a region with --dma BDF")
        fd, _ = self._holdings.custody.get(_SPACE + guest)
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
