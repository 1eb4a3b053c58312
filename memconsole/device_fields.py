"""The table of PCI functions: each with its BARs, who maps them, its group, its driver and the guest that has it."""

from __future__ import annotations

from collections.abc import Sequence

from memconsole.field import Field, Table
from memconsole.model import Device, Snapshot, Window
from memconsole.units import format_size

_CLASSES = {
    0x00: "old", 0x01: "storage", 0x02: "network", 0x03: "display", 0x04: "multimedia", 0x05: "memory", 0x06: "bridge",
    0x07: "comms", 0x08: "system", 0x09: "input", 0x0A: "docking", 0x0B: "processor", 0x0C: "serial bus",
    0x0D: "wireless", 0x0E: "intelligent", 0x0F: "satellite", 0x10: "encryption", 0x11: "signal", 0x12: "accelerator",
    0x13: "instrument", 0x40: "coprocessor", 0xFF: "unassigned",
}  # fmt: skip
"""The base classes of PCI functions (PCI Code and ID Assignment Specification)."""


class DeviceRow(Device, frozen=True):
    """A PCI function with its windows."""

    windows: tuple[Window, ...] = ()


def device_rows(snapshot: Snapshot) -> Sequence[DeviceRow]:
    """The functions of a Snapshot, each with its windows."""
    held: dict[str, list[Window]] = {}
    for window in snapshot.windows:
        held.setdefault(window.bdf, []).append(window)
    names = Device.__struct_fields__
    return [
        DeviceRow(**{name: getattr(device, name) for name in names}, windows=tuple(held.get(device.bdf, ())))
        for device in snapshot.devices
    ]


def _class_words(device: Device) -> str:
    return f"{device.class_code:06x} {_CLASSES.get(device.class_code >> 16, '')}".rstrip()


def _bars(row: DeviceRow) -> tuple[str, ...]:
    return tuple(f"{each.bar}:{format_size(each.size)}{' io' if each.io else ''}" for each in row.windows)


def _mapped_by(row: DeviceRow) -> tuple[int, ...]:
    return tuple(sorted({pid for window in row.windows for pid in window.holders}))


def _guests(row: DeviceRow) -> tuple[str, ...]:
    return tuple(dict.fromkeys(window.guest for window in row.windows if window.guest is not None))


DEVICES = Table(
    "devices",
    "PCI devices",
    device_rows,
    lambda device: str(device.bdf),
    (
        Field("bdf", "Device", "PCI address", lambda d: d.bdf, width=12),
        Field("id", "Id", "vendor:device", lambda d: f"{d.vendor:04x}:{d.device:04x}", width=9),
        Field("class", "Class", "PCI class, as a number and in a word", _class_words, width=18),
        Field("driver", "Driver", "kernel driver", lambda d: d.driver, width=14),
        Field("group", "Group", "IOMMU group", lambda d: d.group, width=5, right=True),
        Field("bars", "BARs", "its windows: number and size of each BAR", _bars, width=20),
        Field("mapped", "Mapped by", "processes that map one of its windows (PID)", _mapped_by, width=12),
        Field("guest", "Guest", "guest that one of its windows is granted to", _guests, width=12),
        Field("holders", "Held by", "processes that have it by VFIO (PID)", lambda d: d.holders, width=12),
        Field("bridge", "Behind", "the bridge it is behind", lambda d: d.bridge, width=12),
        Field("node", "Node", "NUMA node", lambda d: d.node if d.node >= 0 else None, width=4, right=True),
    ),
)
