"""VFIO's own containers (linux/vfio.h, IOMMU type 1), for kernels without /dev/iommu; sizes and addresses in bytes.

    /dev/vfio/vfio      a container: an address space
    /dev/vfio/GROUP     the IOMMU group of that number, opened by one process at a time, put into a container
    a device's file     from its group (VFIO_GROUP_GET_DEVICE_FD)

A range is mapped from a mapping of the calling process. Its pages are pinned and in the page tables when the call
returns, and nothing looks at that address again while every device of the container is behind an IOMMU: the process may
unmap it, or die. Whoever has the container may unmap the range (since Linux 6.0; before, only who mapped it), so that
VFIO_UPDATE_VADDR, which gives it another address, is not needed. The pins are charged to the process that mapped, which
CAP_IPC_LOCK frees of a limit.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from memconsole.backend.dma.iommufd import Mapping, call, unmappable
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import KernelRefused, MemconsoleError

CONTAINER = "/dev/vfio/vfio"
GROUPS = "/dev/vfio"

_IO = ord(";") << 8
_CHECK_EXTENSION, _SET_IOMMU, _GROUP_STATUS, _SET_CONTAINER, _GET_DEVICE, _GET_INFO, _MAP, _UNMAP = (
    _IO | 100 + number for number in (1, 2, 3, 4, 6, 12, 13, 14)
)
_TYPE1V2 = 3
_VIABLE = 1
_READABLE, _WRITEABLE = 1, 2


def create(root: Root = "/") -> int:
    """A new container, which the caller closes; it maps nothing before it has a group.

    Raises:
        NotFound, Denied, KernelRefused: there is no /dev/vfio/vfio, or it cannot be opened.
        MemconsoleError: this kernel has no type 1 (``NoVfio``).
    """
    container = _open(root, CONTAINER)
    try:
        known = fcntl.ioctl(container, _CHECK_EXTENSION, _TYPE1V2)
    except OSError as error:
        os.close(container)
        raise KernelRefused("VFIO_CHECK_EXTENSION", error.errno or errno.EIO) from error
    if not known:
        os.close(container)
        what, why = "VFIO cannot map memory for devices", "this kernel has no VFIO_TYPE1v2_IOMMU"
        raise MemconsoleError(what, why, "modprobe vfio_iommu_type1", code="NoVfio")
    return container


def open_group(root: Root, group: int) -> int:
    """An IOMMU group, which the caller closes.

    Raises:
        KernelRefused: ``DeviceInUse``: somebody has it open. NotFound, Denied: it cannot be opened.
    """
    path = f"{GROUPS}/{group}"
    try:
        return _open(root, path)
    except KernelRefused as error:
        if error.errno != errno.EBUSY:
            raise
        what, remedy = f"IOMMU group {group} is in use", "have the process that holds it close it (fuser /dev/vfio/*)"
        raise KernelRefused(path, error.errno, what=what, remedy=remedy, code="DeviceInUse") from error


def join(group: int, number: int, container: int) -> None:
    """Put a group into a container: its devices reach what that maps, and nothing else.

    Raises:
        KernelRefused: ``DeviceInUse``: a driver has one of its devices; ``NotIsolated``: interrupts are not remapped.
    """
    status = call("VFIO_GROUP_GET_STATUS", group, _GROUP_STATUS, struct.pack("II", 8, 0))
    what = f"IOMMU group {number} cannot be confined"
    if not struct.unpack_from("I", status, 4)[0] & _VIABLE:
        remedy = "unbind the driver that has another device of the group"
        raise KernelRefused("VFIO_GROUP_GET_STATUS", errno.EBUSY, what=what, remedy=remedy, code="DeviceInUse")
    try:
        call("VFIO_GROUP_SET_CONTAINER", group, _SET_CONTAINER, struct.pack("i", container))
        try:
            fcntl.ioctl(container, _SET_IOMMU, _TYPE1V2)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it was set with the container's first group
                raise KernelRefused("VFIO_SET_IOMMU", error.errno or errno.EIO) from error
    except KernelRefused as error:
        code, remedy = "", "see dmesg"
        if error.errno == errno.EPERM:
            code, remedy = (
                "NotIsolated",
                "enable interrupt remapping in the firmware: without it the device can send any interrupt to this host",
            )
        raise KernelRefused(error.source, error.errno, what=what, remedy=remedy, code=code) from error


def open_device(group: int, bdf: str) -> int:
    """A device of a group that is in a container, as a file, which the caller closes.

    Raises:
        KernelRefused: it is not in the group, or its driver is not VFIO's.
    """
    try:
        return int(fcntl.ioctl(group, _GET_DEVICE, bytearray(bdf.encode() + b"\0")))
    except OSError as error:
        what = f"device {bdf} cannot be opened"
        raise KernelRefused("VFIO_GROUP_GET_DEVICE_FD", error.errno or errno.EIO, what=what) from error


def map_file(container: int, want: Mapping) -> None:
    """Map a range of a memory file; its pages are put in place, and pinned until it is unmapped.

    Raises:
        KernelRefused: ``IovaTaken``, ``BadIova``, ``NoMemory``, or what else the kernel says.
    """
    flags = _READABLE | (_WRITEABLE if want.writable else 0)
    with want.viewed() as address:
        request = struct.pack("IIQQQ", 32, flags, address, want.iova, want.length)
        try:
            call("VFIO_IOMMU_MAP_DMA", container, _MAP, request)
        except KernelRefused as error:
            raise unmappable(error, want.iova) from error


def unmap(container: int, iova: int, length: int) -> int:
    """Unmap all that was mapped inside a range; when this returns no device reaches it. How many bytes it was.

    Raises:
        KernelRefused: a mapping lies across an end of the range; nothing was unmapped.
    """
    try:
        answer = call("VFIO_IOMMU_UNMAP_DMA", container, _UNMAP, struct.pack("IIQQ", 24, 0, iova, length))
    except KernelRefused as error:
        if error.errno == errno.EINVAL and not _has_group(container):
            return 0
        raise
    return int(struct.unpack_from("Q", answer, 16)[0])


def _has_group(container: int) -> bool:
    """Whether a container maps anything: it does with the first of its groups, and no more once the last has left."""
    try:
        call("VFIO_IOMMU_GET_INFO", container, _GET_INFO, struct.pack("IIQII", 24, 0, 0, 0, 0))
    except KernelRefused as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _open(root: Root, path: str) -> int:
    try:
        return os.open(tree.below(root, path), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error
