"""PCI functions, their MMIO windows, and the IOMMU."""

from __future__ import annotations

from memconsole.model.base import Value


class Device(Value, frozen=True):
    """A PCI function (/sys/bus/pci/devices/BDF) behind a bridge, if any; ``holders`` are PIDs that have it by VFIO."""

    bdf: str
    vendor: int
    device: int
    class_code: int
    driver: str | None = None
    group: int | None = None
    node: int = -1
    bridge: str | None = None
    holders: tuple[int, ...] = ()


class Window(Value, frozen=True):
    """An MMIO range of a device (a row of /sys/bus/pci/devices/BDF/resource); ``holders`` are PIDs that map it."""

    id: str
    bdf: str
    bar: int
    start: int
    size: int
    io: bool = False
    prefetchable: bool = False
    wide: bool = False
    driver: str | None = None
    claimed: str | None = None
    holders: tuple[int, ...] = ()
    grant: str | None = None
    guest: str | None = None


class Reserved(Value, frozen=True):
    """An IOVA range a domain must not use (/sys/kernel/iommu_groups/N/reserved_regions)."""

    start: int
    end: int
    kind: str


class Domain(Value, frozen=True):
    """An IOMMU address space: its group's type, devices and, where the kernel shows page tables, IOVA extents."""

    group: int
    kind: str
    iommu: str
    devices: tuple[str, ...] = ()
    reserved: tuple[Reserved, ...] = ()
    mapped: int | None = None
    extents: int | None = None
    why_not: str = ""


class Iommu(Value, frozen=True):
    """An IOMMU of the host (/sys/class/iommu/NAME)."""

    name: str
    kind: str
    devices: tuple[str, ...] = ()
    detail: str = ""
