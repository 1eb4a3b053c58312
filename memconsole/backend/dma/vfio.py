"""A PCI device in the hands of vfio-pci, the driver that lets it do nothing by itself.

    /sys/bus/pci/devices/BDF/driver_override    "vfio-pci": no other driver may have it
    /sys/bus/pci/drivers_probe                  BDF: let a driver take it
    /sys/bus/pci/devices/BDF/vfio-dev/vfioN     the name of its file, /dev/vfio/devices/vfioN

vfio-pci resets a device, where it can be, when its file is opened and when the last of it is closed, and lets it master
the bus no more from then on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import KernelRefused, MemconsoleError, NotFound

DRIVER = "vfio-pci"
FILES = "/dev/vfio/devices"

_GET_REGION_INFO = ord(";") << 8 | 100 + 8
_CONFIG_REGION = 7
_COMMAND = 4
_MEMORY, _MASTER = 2, 4
_MAPPABLE = 4


def driver(root: Root, bdf: str) -> str | None:
    """The driver that has a device, if one has it."""
    return tree.link_name(root, f"/sys/bus/pci/devices/{bdf}/driver")


def bind(root: Root, bdf: str) -> None:
    """Give a device that no driver has to vfio-pci.

    Raises:
        MemconsoleError: the driver is not there (``NoVfio``), or does not take it.
    """
    override = f"/sys/bus/pci/devices/{bdf}/driver_override"
    _write(root, override, DRIVER)
    _write(root, "/sys/bus/pci/drivers_probe", bdf)
    if driver(root, bdf) != DRIVER:
        _write(root, override, "\n")
        raise MemconsoleError(f"{DRIVER} does not take device {bdf}", "", "look at dmesg", code="NoVfio")


def unbind(root: Root, bdf: str) -> None:
    """Take a device from vfio-pci again; no driver has it afterwards.

    Raises:
        NotFound, Denied, KernelRefused: it cannot be.
    """
    _write(root, f"/sys/bus/pci/devices/{bdf}/driver_override", "\n")
    _write(root, f"/sys/bus/pci/drivers/{DRIVER}/unbind", bdf)


def has_file(root: Root, bdf: str) -> bool:
    """Whether a device that vfio-pci has got a file of its own (CONFIG_VFIO_DEVICE_CDEV, Linux 6.6)."""
    return tree.exists(root, f"/sys/bus/pci/devices/{bdf}/vfio-dev")


def open_device(root: Root, bdf: str) -> int:
    """A device's file, which the caller closes; until it is bound to an iommufd it can do nothing.

    Raises:
        NotFound: the kernel makes no such files (CONFIG_VFIO_DEVICE_CDEV). Denied, KernelRefused: it cannot be opened.
    """
    try:
        names = tree.names(root, f"/sys/bus/pci/devices/{bdf}/vfio-dev")
    except NotFound:
        names = []
    if not names:
        why, remedy = f"{DRIVER} made none for it", "use a kernel with CONFIG_VFIO_DEVICE_CDEV"
        raise NotFound(f"device {bdf} has no file in {FILES}", why, remedy, code="NoVfio")
    path = f"{FILES}/{names[0]}"
    try:
        return os.open(tree.below(root, path), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error


class Region(NamedTuple):
    """A region of a device (a BAR by its number, the configuration space): where it is in the device's file."""

    offset: int
    size: int
    mappable: bool


def region(device: int, index: int) -> Region:
    """What a device says of one of its regions; ``size`` 0 where it has none.

    Raises:
        KernelRefused: it does not say.
    """
    try:
        answer = fcntl.ioctl(device, _GET_REGION_INFO, struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
    except OSError as error:
        raise KernelRefused("VFIO_DEVICE_GET_REGION_INFO", error.errno or errno.EIO) from error
    _, flags, _, _, size, offset = struct.unpack("IIIIQQ", answer)
    return Region(offset, size, bool(flags & _MAPPABLE))


def enable(device: int) -> None:
    """Let an attached device answer to its BARs and master the bus (PCI command register).

    Raises:
        KernelRefused: its configuration space cannot be reached.
    """
    try:
        at = region(device, _CONFIG_REGION).offset + _COMMAND
        (command,) = struct.unpack("<H", os.pread(device, 2, at))
        os.pwrite(device, struct.pack("<H", command | _MEMORY | _MASTER), at)
    except OSError as error:
        raise KernelRefused("the configuration space of a VFIO device", error.errno or errno.EIO) from error


def _write(root: Root, path: str, text: str) -> None:
    try:
        fd = os.open(tree.below(root, path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(path, error) from error
