"""What an address space is made of, behind one interface: iommufd, or VFIO's own containers.

iommufd   its fd is an iommufd, in which the address space has an id    devices have files of their own
type1     its fd is a container, which is the address space             devices come out of their group
vmm       its fd is an iommufd; a VMM makes address spaces in it and maps its memory there (:mod:`.vmm`)
"""

from __future__ import annotations

import enum
import os
from typing import NamedTuple, Protocol

from memconsole.backend.dma import iommufd, type1, vfio
from memconsole.backend.dma.iommufd import Mapping
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound


class SpaceKind(enum.StrEnum):
    """Which of them; as custody's payload has it."""

    IOMMUFD = "iommufd"
    TYPE1 = "type1"
    VMM = "vmm"


class Backend(Protocol):
    """An address space that is open, and filled by us; the fds in it are its caller's."""

    def attach(self, root: Root, bdf: str, group: int | None) -> int:
        """A device's file, which the caller closes; with that the device reaches what is mapped, and nothing else.

        ``group`` is its IOMMU group's file, where there is one (:func:`join`).

        Raises:
            NotFound, Denied, KernelRefused: it cannot be opened, confined or attached.
        """

    def map(self, want: Mapping) -> None:
        """Map a range of a memory file.

        Raises:
            KernelRefused: the kernel will not (``IovaTaken``, ``BadIova``, ``NoMemory``).
        """

    def unmap(self, iova: int, length: int) -> int:
        """Unmap what was mapped inside a range, for every device; how many bytes it was.

        Raises:
            KernelRefused: the kernel will not, and the devices still reach it.
        """


def choose_backend(root: Root, bdf: str) -> SpaceKind:
    """What a device that vfio-pci has can be confined with: iommufd where the kernel has it and the device's file.

    Raises:
        NotFound: neither that nor VFIO's containers are there (``NoVfio``).
    """
    if tree.exists(root, iommufd.DEVICE) and vfio.has_file(root, bdf):
        return SpaceKind.IOMMUFD
    if tree.exists(root, type1.CONTAINER):
        return SpaceKind.TYPE1
    why = f"there is neither {iommufd.DEVICE} with a file for it in {vfio.FILES}, nor {type1.CONTAINER}"
    remedy = "use a kernel with CONFIG_VFIO_DEVICE_CDEV, or modprobe vfio_iommu_type1"
    raise NotFound(f"device {bdf} cannot be confined", why, remedy, code="NoVfio")


def create(root: Root, kind: SpaceKind) -> tuple[int, int]:
    """A new, empty address space: its fd, which the caller closes, and its id in it.

    Raises:
        NotFound, Denied, KernelRefused: the kernel has none of this kind.
    """
    if kind is SpaceKind.TYPE1:
        return type1.create(root), 0
    fd = iommufd.create(root)
    try:
        return fd, iommufd.make_space(fd) if kind is SpaceKind.IOMMUFD else 0
    except BaseException:
        os.close(fd)
        raise


def opened(kind: SpaceKind, fd: int, space: int) -> Backend:
    """An address space that is not a VMM's, by what custody has of it."""
    if kind is SpaceKind.TYPE1:
        return _Type1(fd)
    return _Iommufd(fd, space)


def join(root: Root, number: int, container: int) -> int:
    """The file of an IOMMU group that is in a container from now on; the caller closes it.

    Raises:
        NotFound, Denied, KernelRefused: it cannot be opened, or not be confined.
    """
    group = type1.open_group(root, number)
    try:
        type1.join(group, number, container)
    except BaseException:
        os.close(group)
        raise
    return group


class _Iommufd(NamedTuple):
    fd: int
    space: int

    def attach(self, root: Root, bdf: str, group: int | None) -> int:  # noqa: ARG002 - a device has its own file
        device = vfio.open_device(root, bdf)
        try:
            iommufd.bind(device, bdf, self.fd)
            iommufd.attach(device, self.space)
        except BaseException:
            os.close(device)
            raise
        return device

    def map(self, want: Mapping) -> None:
        iommufd.map_file(self.fd, self.space, want)

    def unmap(self, iova: int, length: int) -> int:
        return iommufd.unmap(self.fd, self.space, iova, length)


class _Type1(NamedTuple):
    fd: int

    def attach(self, root: Root, bdf: str, group: int | None) -> int:  # noqa: ARG002 - its group is open
        assert group is not None  # noqa: S101 - whoever made the address space knows its kind
        return type1.open_device(group, bdf)

    def map(self, want: Mapping) -> None:
        type1.map_file(self.fd, want)

    def unmap(self, iova: int, length: int) -> int:
        return type1.unmap(self.fd, iova, length)
