"""A PCI device in the hands of vfio-pci, the driver that lets it do nothing by itself.

    /sys/bus/pci/devices/BDF/driver_override    "vfio-pci": no other driver may have it
    /sys/bus/pci/drivers_probe                  BDF: let a driver take it
    /sys/bus/pci/devices/BDF/vfio-dev/vfioN     the name of its file, /dev/vfio/devices/vfioN

vfio-pci resets a device, where it can be, when its file is opened and when the last of it is closed, and lets it master
the bus no more from then on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import KernelRefused, MemconsoleError, NotFound

DRIVER = "vfio-pci"
PASSIVE = frozenset({None, DRIVER, "pci-stub", "pcieport"})
"""Drivers that do no DMA themselves, and none."""
FILES = "/dev/vfio/devices"

_GET_INFO, _GET_REGION_INFO = (ord(";") << 8 | 100 + number for number in (7, 8))
_CONFIG_REGION = 7
_COMMAND, _STATUS, _CAPABILITIES = 4, 6, 0x34
_MEMORY, _MASTER, _LISTED = 2, 4, 16
_EXPRESS, _DEVICE_STATUS, _PENDING = 0x10, 10, 1 << 5
_RESET, _MAPPABLE = 1, 4
_DRAIN_S = 1.5
"""Seconds a device has for the completions it waits for; the kernel gives it as long before a reset."""


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
        raise MemconsoleError(
            f"{DRIVER} does not bind device {bdf}", "the kernel refused it", "see dmesg", code="NoVfio"
        )


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
        why, remedy = f"{DRIVER} created none for it", "use a kernel with CONFIG_VFIO_DEVICE_CDEV"
        raise NotFound(f"device {bdf} has no file in {FILES}", why, remedy, code="NoVfio")
    path = f"{FILES}/{names[0]}"
    try:
        return os.open(tree.below(root, path), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise tree.failure(path, error) from error


class VfioRegion(NamedTuple):
    """A region of a device (a BAR by its number, the configuration space): where it is in the device's file."""

    offset: int
    size: int
    mappable: bool


def region(device: int, index: int) -> VfioRegion:
    """What a device says of one of its regions; ``size`` 0 where it has none.

    Raises:
        KernelRefused: it does not say.
    """
    try:
        answer = fcntl.ioctl(device, _GET_REGION_INFO, struct.pack("IIIIQQ", 32, 0, index, 0, 0, 0))
    except OSError as error:
        raise KernelRefused("VFIO_DEVICE_GET_REGION_INFO", error.errno or errno.EIO) from error
    _, flags, _, _, size, offset = struct.unpack("IIIIQQ", answer)
    return VfioRegion(offset, size, bool(flags & _MAPPABLE))


def enable(device: int, *, master: bool = True) -> None:
    """Let an attached device answer to its BARs and, with ``master``, master the bus (PCI command register).

    Raises:
        KernelRefused: its configuration space cannot be reached.
    """
    with _config(device) as config:
        config.write(_COMMAND, config.read(_COMMAND, 2) | _MEMORY | (_MASTER if master else 0))


def quiesce(device: int) -> None:
    """Take the bus from a device: when this returns it neither reads nor writes memory, nor interrupts anybody.

    What it had written before has arrived (a read behind it pushes it out), and a PCI Express device has got what it
    had asked for. It keeps its registers: :func:`enable` lets it go on.

    Raises:
        KernelRefused: its configuration space cannot be reached, or it waits for ever (``Restless``).
    """
    with _config(device) as config:
        config.write(_COMMAND, config.read(_COMMAND, 2) & ~_MASTER)
        if config.read(_COMMAND, 2) & _MASTER:
            raise KernelRefused(
                "PCI command register",
                errno.EIO,
                what="bus mastering cannot be switched off",
                remedy="see dmesg",
                code="Restless",
            )
        status = config.find(_EXPRESS)
        deadline = time.monotonic() + _DRAIN_S
        while status and config.read(status + _DEVICE_STATUS, 2) & _PENDING:
            if time.monotonic() > deadline:
                what = f"it still waited for memory after {_DRAIN_S:g} s"
                raise KernelRefused("PCI Express device status", errno.ETIMEDOUT, what=what, code="Restless")
            time.sleep(0.001)


def masters(device: int) -> bool:
    """Whether a device may master the bus.

    Raises:
        KernelRefused: its configuration space cannot be reached.
    """
    with _config(device) as config:
        return bool(config.read(_COMMAND, 2) & _MASTER)


def resets(device: int) -> bool:
    """Whether vfio-pci can reset a device; it does then, whenever the device's file is opened first.

    Raises:
        KernelRefused: it is no VFIO device.
    """
    with _named_as_config():
        return bool(
            struct.unpack_from("I", fcntl.ioctl(device, _GET_INFO, struct.pack("IIIII", 20, 0, 0, 0, 0)), 4)[0] & _RESET
        )


class _Config:
    """The configuration space of an open device; numbers are little-endian."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._at = region(device, _CONFIG_REGION).offset

    def read(self, at: int, size: int) -> int:
        return int.from_bytes(os.pread(self._device, size, self._at + at), "little")

    def write(self, at: int, value: int) -> None:
        os.pwrite(self._device, struct.pack("<H", value), self._at + at)

    def find(self, capability: int) -> int:
        """Where a capability stands; 0 where the device has none of it."""
        at = self.read(_CAPABILITIES, 1) if self.read(_STATUS, 2) & _LISTED else 0
        for _ in range(48):  # more do not fit
            if not at or self.read(at, 1) == capability:
                return at
            at = self.read(at + 1, 1)
        return 0


@contextlib.contextmanager
def _named_as_config() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KernelRefused("the configuration space of a VFIO device", error.errno or errno.EIO) from error


@contextlib.contextmanager
def _config(device: int) -> Iterator[_Config]:
    with _named_as_config():
        yield _Config(device)


def _write(root: Root, path: str, text: str) -> None:
    try:
        fd = os.open(tree.below(root, path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise tree.failure(path, error) from error
