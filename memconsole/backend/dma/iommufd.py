"""iommufd's calls (linux/iommufd.h) and VFIO's that lead to it (linux/vfio.h); sizes and addresses in bytes.

All are ``_IO(';', NUMBER)`` on a struct that begins with its own size.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import KernelRefused

DEVICE = "/dev/iommu"

_IO = ord(";") << 8
_IOAS_ALLOC, _IOAS_RANGES, _IOAS_MAP, _IOAS_UNMAP, _IOAS_MAP_FILE = (
    _IO | number for number in (0x81, 0x84, 0x85, 0x86, 0x8F)
)
_BIND, _ATTACH, _DETACH = (_IO | 100 + number for number in (18, 19, 20))
_FIXED_IOVA, _WRITEABLE, _READABLE = 1, 2, 4

OBJECTS_MAX = 256
"""The kernel gives the lowest free id; a VMM makes a handful of objects for each device."""
EVERYTHING = (1 << 64) - 1
"""The length that, from IOVA 0 on, unmaps all of an address space."""


def create(root: Root = "/") -> int:
    """A new iommufd, which the caller closes.

    Raises:
        NotFound, Denied, KernelRefused: there is no /dev/iommu, or it cannot be opened.
    """
    try:
        return os.open(tree.below(root, DEVICE), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(DEVICE, error) from error


def make_space(iommufd: int) -> int:
    """The id of a new, empty address space.

    Raises:
        KernelRefused: no memory.
    """
    return int(
        struct.unpack_from("I", call("IOMMU_IOAS_ALLOC", iommufd, _IOAS_ALLOC, struct.pack("III", 12, 0, 0)), 8)[0]
    )


def bind(device: int, bdf: str, iommufd: int) -> None:
    """Give the DMA of an open VFIO device to an iommufd, for as long as the device is open.

    Raises:
        KernelRefused: ``NotIsolated``: its interrupts are not remapped; ``DeviceInUse``: somebody else has it, or a
            driver has another device of its group.
    """
    try:
        call("VFIO_DEVICE_BIND_IOMMUFD", device, _BIND, struct.pack("IIiI", 16, 0, iommufd, 0))
    except KernelRefused as error:
        names = {
            errno.EPERM: (
                "NotIsolated",
                "enable interrupt remapping in the firmware: without it the device can send any interrupt to this host",
            ),
            errno.EBUSY: ("DeviceInUse", "unbind the driver that has another device of its IOMMU group"),
            errno.EINVAL: ("DeviceInUse", "have the process that holds it close it (fuser /dev/vfio/devices/*)"),
        }
        code, remedy = names.get(error.errno, ("", "see dmesg"))
        what = f"device {bdf} cannot be confined"
        raise KernelRefused(error.source, error.errno, what=what, remedy=remedy, code=code) from error


def attach(device: int, space: int) -> None:
    """Let a bound device reach what an address space maps, and nothing else.

    Raises:
        KernelRefused: the IOMMU cannot translate for it.
    """
    call("VFIO_DEVICE_ATTACH_IOMMUFD_PT", device, _ATTACH, struct.pack("III", 12, 0, space))


def detach(device: int) -> None:
    """Let a device reach nothing any more; one that is not attached, or not bound, reaches nothing.

    Raises:
        KernelRefused: the kernel will not, and it still reaches what it did.
    """
    try:
        call("VFIO_DEVICE_DETACH_IOMMUFD_PT", device, _DETACH, struct.pack("II", 8, 0))
    except KernelRefused as error:
        if error.errno != errno.EINVAL:
            raise


def spaces(iommufd: int) -> list[int]:
    """The ids of the address spaces of an iommufd, whoever made them, among its first ``OBJECTS_MAX`` objects."""
    found = []
    for id in range(1, OBJECTS_MAX + 1):
        try:
            call("IOMMU_IOAS_IOVA_RANGES", iommufd, _IOAS_RANGES, struct.pack("IIIIQQ", 32, id, 0, 0, 0, 0))
        except KernelRefused as error:
            if error.errno == errno.ENOENT:  # another kind of object, or none
                continue
            if error.errno != errno.EMSGSIZE:  # there are ranges, and no room to say which
                raise
        found.append(id)
    return found


class Mapping(NamedTuple):
    """A range of a memory file, and the IOVA at which devices find it."""

    file: int
    offset: int
    length: int
    iova: int
    writable: bool

    @property
    def flags(self) -> int:
        """As both calls take them."""
        return _FIXED_IOVA | _READABLE | (_WRITEABLE if self.writable else 0)

    @contextlib.contextmanager
    def viewed(self) -> Iterator[int]:
        """Where this process has the range mapped meanwhile; the pins of a device keep the pages afterwards."""
        with mmap.mmap(self.file, self.length, offset=self.offset) as view:
            anchor = ctypes.c_char.from_buffer(view)
            try:
                yield ctypes.addressof(anchor)
            finally:
                del anchor


def map_file(iommufd: int, space: int, want: Mapping) -> None:
    """Map a range of a memory file; its pages are put in place, and pinned until it is unmapped.

    Raises:
        KernelRefused: ``IovaTaken``, ``BadIova``, ``NoMemory``, or what else the kernel says.
    """
    request = struct.pack("IIIiQQQ", 40, want.flags, space, want.file, want.offset, want.length, want.iova)
    try:
        call("IOMMU_IOAS_MAP_FILE", iommufd, _IOAS_MAP_FILE, request)
    except KernelRefused as error:
        if error.errno != errno.ENOTTY:
            raise unmappable(error, want.iova) from error
        map_memory(iommufd, space, want)


def map_memory(iommufd: int, space: int, want: Mapping) -> None:
    """The same through a mapping of this process, for kernels before 6.13; a device must be attached already.

    Raises:
        KernelRefused: as :func:`map_file`.
    """
    with want.viewed() as address:
        request = struct.pack("IIIIQQQ", 40, want.flags, space, 0, address, want.length, want.iova)
        try:
            call("IOMMU_IOAS_MAP", iommufd, _IOAS_MAP, request)
        except KernelRefused as error:
            raise unmappable(error, want.iova) from error


def unmap(iommufd: int, space: int, iova: int, length: int) -> int:
    """Unmap all that was mapped inside a range; when this returns no device reaches it. How many bytes it was.

    Raises:
        KernelRefused: a mapping lies across an end of the range; nothing was unmapped.
    """
    try:
        answer = call("IOMMU_IOAS_UNMAP", iommufd, _IOAS_UNMAP, struct.pack("IIQQ", 24, space, iova, length))
    except KernelRefused as error:
        if error.errno == errno.ENOENT:
            return 0
        raise
    return int(struct.unpack_from("Q", answer, 16)[0])


def unmappable(error: KernelRefused, iova: int) -> KernelRefused:
    """Why an IOVA was not mapped, by name."""
    names = {
        errno.EEXIST: ("IovaTaken", "revoke the grant that is mapped there"),
        errno.EINVAL: ("BadIova", "choose another --gpa: the IOMMU or a device of the guest cannot reach this one"),
        errno.ENOMEM: ("NoMemory", "free memory, or map less: a device pins every page"),
    }
    code, remedy = names.get(error.errno, ("", ""))
    what = f"IOVA {iova:#x} cannot be mapped"
    return KernelRefused(error.source, error.errno, what=what, remedy=remedy, code=code)


def call(name: str, fd: int, number: int, request: bytes) -> bytes:
    """A call on a struct, as the kernel left it.

    Raises:
        KernelRefused: it failed.
    """
    try:
        return fcntl.ioctl(fd, number, request)
    except OSError as error:
        raise KernelRefused(name, error.errno or errno.EIO) from error
