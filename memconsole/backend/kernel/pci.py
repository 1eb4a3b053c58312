"""PCI functions and their BARs, and who has them.

    /sys/bus/pci/devices/BDF/uevent         DRIVER=NAME  PCI_CLASS=%X  PCI_ID=VVVV:DDDD
    /sys/bus/pci/devices/BDF/resource       rows 0-5 are BARs (6 the ROM, then windows of a bridge):
                                            START " " END " " FLAGS, hexadecimal, END inclusive, zeros where unused
    /sys/bus/pci/devices/BDF/{numa_node,iommu_group}
    /sys/bus/pci/devices/BDF -> .../BRIDGE/BDF
    /sys/kernel/iommu_groups/N/devices/BDF

A process maps a BAR through sysfs (``.../BDF/resourceN``) or VFIO (``anon_inode:[vfio-device]``,
``/dev/vfio/devices/vfioN``; the offset is the BAR's number << 40).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from memconsole.backend.kernel import procmaps, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Gone, NotFound
from memconsole.model import Device, Range, Window

_DEVICES = "/sys/bus/pci/devices"
_GROUPS = "/sys/kernel/iommu_groups"
_BARS = 6
_BRIDGE = 0x06
_IO, _MEM, _PREFETCH, _MEM_64 = 0x100, 0x200, 0x2000, 0x100000
_UNSET, _DISABLED = 0x20000000, 0x10000000
_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_SYSFS = re.compile(r".*/([0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])/resource(\d)(?:_wc)?")
_VFIO_ANON, _VFIO_CDEV, _VFIO_GROUP = "anon_inode:[vfio-device]", "/dev/vfio/devices/", "/dev/vfio/"
_VFIO_INDEX = 40
VFIO_CLAIMS = frozenset({"vfio", "vfio-pci"})
"""What /proc/iomem calls a BAR that vfio-pci keeps for whoever has the device."""


class Function(msgspec.Struct, frozen=True):
    """A PCI function with its BARs as windows nobody has been asked about yet."""

    device: Device
    bars: tuple[Window, ...]


def functions(root: Root = "/") -> tuple[Function, ...]:
    """The PCI functions by address, bridges included; a function unplugged meanwhile is left out.

    Raises:
        NotFound: this host has no PCI.
        Denied, KernelRefused, BadFile: one of them cannot be read.
    """
    found = []
    for bdf in sorted(tree.names(root, _DEVICES)):
        try:
            found.append(_function(root, bdf))
        except NotFound:
            continue
    return tuple(found)


def windows(
    known: Iterable[Function],
    iomem: Sequence[Range] = (),
    ioports: Sequence[Range] = (),
    holders: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Window, ...]:
    """The BARs of all functions with who the kernel says has each range, and the PIDs that map it."""
    claims = {False: _claims(iomem), True: _claims(ioports)}
    return tuple(
        Window(
            id=bar.id,
            bdf=bar.bdf,
            bar=bar.bar,
            start=bar.start,
            size=bar.size,
            io=bar.io,
            prefetchable=bar.prefetchable,
            wide=bar.wide,
            driver=bar.driver,
            claimed=claims[bar.io].get((bar.bdf, bar.start)),
            holders=(holders or {}).get(bar.id, ()),
        )
        for function in known
        for bar in function.bars
    )


def holders(census: Census, known: Iterable[Function]) -> dict[str, tuple[int, ...]]:
    """The PIDs that map each BAR, by window id.

    A VFIO mapping does not name its device: it counts for every device the process holds that has such a BAR.

    Raises:
        KernelRefused, BadFile: a process cannot be read.
    """
    bars = {bar.id: bar for function in known for bar in function.bars}
    found: dict[str, set[int]] = {}
    for process in census.processes.values():
        if b"/resource" not in process.maps and b"vfio" not in process.maps:
            continue
        for vma in procmaps.parse(process.maps, b"/resource", b"vfio"):
            for window in _mapped(census, process, vma, bars):
                found.setdefault(window, set()).add(process.pid)
    return {window: tuple(sorted(pids)) for window, pids in found.items()}


def openers(census: Census) -> dict[str, tuple[int, ...]]:
    """The PIDs that have each device by VFIO, mapped or not, by BDF.

    Raises:
        KernelRefused, BadFile: a process cannot be read.
    """
    found: dict[str, set[int]] = {}
    for process in census.processes.values():
        if any("vfio" in link for link in process.fds.values()):
            for bdf in _vfio_devices(census.root, process):
                found.setdefault(bdf, set()).add(process.pid)
    return {bdf: tuple(sorted(pids)) for bdf, pids in found.items()}


def device(root: Root, bdf: str) -> Device:
    """One function.

    Raises:
        NotFound: there is none at this address. Denied, KernelRefused, BadFile: it cannot be read.
    """
    base = f"{_DEVICES}/{bdf}"
    source = f"{base}/uevent"
    pairs = dict(row.partition("=")[::2] for row in tree.text(tree.read(root, source)).splitlines())
    group = iommu_group(root, bdf)
    try:
        vendor, product = (int(word, 16) for word in pairs["PCI_ID"].split(":"))
        return Device(
            bdf=bdf,
            vendor=vendor,
            device=product,
            class_code=int(pairs["PCI_CLASS"], 16),
            driver=pairs.get("DRIVER"),
            group=int(group) if group else None,
            node=_node(root, base),
            bridge=_bridge(root, base),
        )
    except (KeyError, ValueError) as error:
        raise tree.malformed(source, pairs) from error


def in_group(root: Root, bdf: str) -> tuple[Device, ...]:
    """A function and, behind it, the others of its IOMMU group by address, bridges included; one unplugged is left out.

    Raises:
        As :func:`device`.
    """
    found = [device(root, bdf)]
    group = iommu_group(root, bdf)
    others = set(tree.names(root, f"{_GROUPS}/{group}/devices")) - {bdf} if group else set()
    for name in sorted(filter(_BDF.fullmatch, others)):
        with contextlib.suppress(NotFound):
            found.append(device(root, name))
    return tuple(found)


def is_bridge(device: Device) -> bool:
    """Whether a function is a bridge, by its class."""
    return device.class_code >> 16 == _BRIDGE


def iommu_group(root: Root, bdf: str) -> str:
    """The number of a function's IOMMU group; empty where it has none."""
    return tree.link_name(root, f"{_DEVICES}/{bdf}/iommu_group") or ""


def _function(root: Root, bdf: str) -> Function:
    found = device(root, bdf)
    rows = tree.text(tree.read(root, f"{_DEVICES}/{bdf}/resource")).splitlines()[:_BARS]
    bars = (_bar(found, number, row) for number, row in enumerate(rows))
    return Function(found, tuple(bar for bar in bars if bar is not None))


def _node(root: Root, base: str) -> int:
    try:
        return tree.number(root, f"{base}/numa_node", 10)
    except NotFound:
        return -1


def _bridge(root: Root, base: str) -> str | None:
    above = (tree.link(root, base) or "").split("/")[-2:-1]
    return above[0] if above and _BDF.fullmatch(above[0]) else None


def _bar(device: Device, number: int, row: str) -> Window | None:
    """A row of ``resource``; None where it holds no BAR, or one without an address."""
    try:
        start, end, flags = (int(word, 16) for word in row.split())
    except ValueError as error:
        raise tree.malformed(f"{_DEVICES}/{device.bdf}/resource", row) from error
    if not flags & (_IO | _MEM) or flags & (_UNSET | _DISABLED) or end <= start:
        return None
    return Window(
        id=f"{device.bdf}:{number}",
        bdf=device.bdf,
        bar=number,
        start=start,
        size=end - start + 1,
        io=bool(flags & _IO),
        prefetchable=bool(flags & _PREFETCH),
        wide=bool(flags & _MEM_64),
        driver=device.driver,
    )


def _claims(ranges: Sequence[Range]) -> dict[tuple[str, int], str]:
    """The first range inside each range that is named after a device: its driver's, or the part of the kernel's."""
    found = {}
    for outer, inner in itertools.pairwise(ranges):
        if inner.depth > outer.depth:
            found[outer.name, outer.start] = inner.name
    return found


def _mapped(census: Census, process: Process, vma: Vma, bars: Mapping[str, Window]) -> list[str]:
    if match := _SYSFS.fullmatch(vma.path):
        candidates = [f"{match[1]}:{match[2]}"]
    elif vma.path.startswith(_VFIO_CDEV):
        bdf = _cdev(census.root, vma.path.removeprefix(_VFIO_CDEV))
        candidates = [f"{bdf}:{vma.offset >> _VFIO_INDEX}"]
    elif vma.path == _VFIO_ANON:
        index = vma.offset >> _VFIO_INDEX
        candidates = [f"{bdf}:{index}" for bdf in _vfio_devices(census.root, process)]
    else:
        return []
    return [name for name in candidates if name in bars and vma.size <= max(bars[name].size, 4096)]


def _cdev(root: Root, name: str) -> str | None:
    return tree.link_name(root, f"/sys/class/vfio-dev/{name}/device")


def _vfio_devices(root: Root, process: Process) -> list[str]:
    """The devices a process holds: as its device fds say (``vfio-device-syspath``), else all of its VFIO groups."""
    said: set[str] = set()
    group_fds = []
    for fd, link in process.fds.items():
        if link == _VFIO_ANON:
            said.update(_syspath(root, process.pid, fd))
        elif link.startswith(_VFIO_CDEV):
            said.update(filter(None, [_cdev(root, link.removeprefix(_VFIO_CDEV))]))
        elif link.startswith(_VFIO_GROUP) and link.removeprefix(_VFIO_GROUP).isdecimal():
            group_fds.append(link.removeprefix(_VFIO_GROUP))
    if not said:
        for group in group_fds:
            said.update(tree.names(root, f"{_GROUPS}/{group}/devices"))
    return sorted(said)


def _syspath(root: Root, pid: int, fd: int) -> list[str]:
    try:
        rows = tree.text(tree.read(root, f"/proc/{pid}/fdinfo/{fd}")).splitlines()
    except Gone:
        return []
    return [row.rsplit("/", 1)[-1] for row in rows if row.startswith("vfio-device-syspath:")]
