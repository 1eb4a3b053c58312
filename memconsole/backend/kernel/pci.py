"""PCI functions and their BARs, and who has them.

    /sys/bus/pci/devices/BDF/uevent         DRIVER=NAME  PCI_CLASS=%X  PCI_ID=VVVV:DDDD
    /sys/bus/pci/devices/BDF/resource       rows 0-5 are BARs (6 the ROM, then windows of a bridge):
                                            START " " END " " FLAGS, hexadecimal, END inclusive, zeros where unused
    /sys/bus/pci/devices/BDF/{numa_node,iommu_group}
    /sys/bus/pci/devices/BDF -> .../BRIDGE/BDF
    /sys/kernel/iommu_groups/N/devices/BDF

A process has a device, or maps a BAR of it, in several ways::

    .../BDF/resourceN[_wc]                                  sysfs: the BAR N
    anon_inode:[vfio-device], /dev/vfio/devices/vfioN       VFIO: offset = BAR << 40
    /dev/vfio/GROUP, /dev/vfio/noiommu-GROUP                ... by its group, with or without an IOMMU
    /dev/uioN                                               UIO: offset = page size * M of maps/mapM/{addr,size}
    /dev/mem, /proc/bus/pci/[DOMAIN:]BUS/DEV.FN             offset = the physical address

What such a file is, not what it is called, decides (:mod:`.devfiles`): it may be a node that was made elsewhere, or be
bound to another place.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from memconsole.backend.kernel import procmaps, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.devfiles import Files, Lead, Way
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Gone, NotFound
from memconsole.model import Device, Range, Unread, Window
from memconsole.units import PAGE

_DEVICES = "/sys/bus/pci/devices"
_GROUPS = "/sys/kernel/iommu_groups"
_BARS = 6
_BRIDGE = 0x06
_IO, _MEM, _PREFETCH, _MEM_64 = 0x100, 0x200, 0x2000, 0x100000
_UNSET, _DISABLED = 0x20000000, 0x10000000
BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
"""The address of a PCI function: what a device is called by in sysfs where it is one, and only there."""
_VFIO_ANON = "anon_inode:[vfio-device]"
_VFIO_INDEX = 40
VFIO_CLAIMS = frozenset({"vfio", "vfio-pci"})
"""What /proc/iomem calls a BAR that vfio-pci keeps for whoever has the device."""


class Function(msgspec.Struct, frozen=True):
    """A PCI function with its BARs as windows nobody has been asked about yet."""

    device: Device
    bars: tuple[Window, ...]


def functions(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Function, ...]:
    """The PCI functions by address, bridges included; a function unplugged meanwhile is left out.

    One that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        NotFound: this host has no PCI.
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """
    found = tree.each(root, _DEVICES, partial(function, root), gaps)
    return tuple(sorted(found, key=lambda function: function.device.bdf))


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


def holders(census: Census, known: Iterable[Function], gaps: list[Unread] | None = None) -> dict[str, tuple[int, ...]]:
    """The PIDs that map each BAR, by window id; a process that cannot be read is named in ``gaps``, or raised.

    A VFIO mapping does not name its device: it counts for every device the process holds that has such a BAR.

    Raises:
        Denied, KernelRefused, BadFile: without ``gaps``, a process cannot be read.
    """
    bars = {bar.id: bar for function in known for bar in function.bars}
    files = Files(census.root, bars.values())
    found: dict[str, set[int]] = {}
    for process in census.processes.values():
        with _alone(process, "maps", gaps):
            for window in _windows_of(census, process, files, bars):
                found.setdefault(window, set()).add(process.pid)
    return {window: tuple(sorted(pids)) for window, pids in found.items()}


def openers(census: Census, gaps: list[Unread] | None = None) -> dict[str, tuple[int, ...]]:
    """The PIDs that have each device by VFIO or UIO, mapped or not, by BDF; gaps and errors as of :func:`holders`."""
    found: dict[str, set[int]] = {}
    files = Files(census.root, ())
    for process in census.processes.values():
        with _alone(process, "fd", gaps):
            leads = tuple(files.opened(process))
            for bdf in (*_vfio_devices(census.root, process, leads), *_uio_devices(census.root, leads)):
                found.setdefault(bdf, set()).add(process.pid)
    return {bdf: tuple(sorted(pids)) for bdf, pids in found.items()}


def may_map(census: Census, process: Process, window: Window) -> bool:
    """Whether a process has a file open, other than VFIO's and UIO's, through which it can map a BAR any time.

    Raises:
        Denied, KernelRefused: a file that it holds cannot be looked at.
    """
    ways = {Lead(Way.MEM, "mem"), Lead(Way.BAR, window.id), Lead(Way.BUS, window.bdf)}
    return any(lead in ways for lead in Files(census.root, (window,)).opened(process))


@contextlib.contextmanager
def _alone(process: Process, what: str, gaps: list[Unread] | None) -> Iterator[None]:
    """What cannot be read of one process costs that alone, and becomes one of ``gaps``; without them it is raised."""
    try:
        yield
    except Gone:
        return
    except tree.UNREADABLE as error:
        if gaps is None:
            raise
        gaps.append(tree.gap(f"/proc/{process.pid}/{what}", error))


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
    for name in sorted(filter(BDF.fullmatch, others)):
        with contextlib.suppress(NotFound):
            found.append(device(root, name))
    return tuple(found)


def is_bridge(device: Device) -> bool:
    """Whether a function is a bridge, by its class."""
    return device.class_code >> 16 == _BRIDGE


def iommu_group(root: Root, bdf: str) -> str:
    """The number of a function's IOMMU group; empty where it has none."""
    return tree.link_name(root, f"{_DEVICES}/{bdf}/iommu_group") or ""


def function(root: Root, bdf: str) -> Function:
    """One function with its BARs.

    Raises:
        As :func:`device`.
    """
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
    return above[0] if above and BDF.fullmatch(above[0]) else None


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


def _windows_of(census: Census, process: Process, files: Files, bars: Mapping[str, Window]) -> Iterator[str]:
    """The BARs that a process maps."""
    for vma, lead in files.mappings(process):
        yield from _through(census.root, vma, lead, bars)
    anonymous = [vma for vma in procmaps.parse(process.maps, _VFIO_ANON.encode()) if vma.path == _VFIO_ANON]
    devices = _vfio_devices(census.root, process, tuple(files.opened(process))) if anonymous else []
    for vma in anonymous:
        ids = (f"{bdf}:{vma.offset >> _VFIO_INDEX}" for bdf in devices)
        yield from (id for id in ids if _fits(vma, id, bars))


def _through(root: Root, vma: Vma, lead: Lead, bars: Mapping[str, Window]) -> list[str]:
    """The BARs that a mapping reaches through a file."""
    if lead.way in {Way.MEM, Way.BUS}:
        return _at(bars, vma.offset, vma.size)
    if lead.way is Way.UIO:
        return _at(bars, *_uio_map(root, lead.name, vma.offset // PAGE))
    id = f"{_cdev(root, lead.name)}:{vma.offset >> _VFIO_INDEX}" if lead.way is Way.VFIO_DEVICE else lead.name
    return [id] if _fits(vma, id, bars) else []


def _fits(vma: Vma, id: str, bars: Mapping[str, Window]) -> bool:
    return id in bars and vma.size <= max(bars[id].size, 4096)


def _at(bars: Mapping[str, Window], start: int, size: int) -> list[str]:
    """The BARs of memory that a range of physical addresses reaches into."""
    return [id for id, bar in bars.items() if not bar.io and bar.start < start + size and start < bar.start + bar.size]


def _uio_map(root: Root, name: str, index: int) -> tuple[int, int]:
    """Physical address and size of a mapping that a driver of UIO offers; of none, nothing."""
    base = f"/sys/class/uio/{name}/maps/map{index}"
    try:
        return tree.number(root, f"{base}/addr"), tree.number(root, f"{base}/size")
    except NotFound:
        return 0, 0


def _uio_devices(root: Root, leads: Sequence[Lead]) -> list[str]:
    names = [lead.name for lead in leads if lead.way is Way.UIO]
    return [bdf for name in names if (bdf := tree.link_name(root, f"/sys/class/uio/{name}/device"))]


def _cdev(root: Root, name: str) -> str | None:
    return tree.link_name(root, f"/sys/class/vfio-dev/{name}/device")


def _vfio_devices(root: Root, process: Process, leads: Sequence[Lead]) -> list[str]:
    """The devices a process holds: as its device fds say (``vfio-device-syspath``, since Linux 6.17), and all of its
    VFIO groups where one of them does not say.
    """
    said: set[str] = set()
    silent = False
    for fd, link in process.fds.items():
        if link == _VFIO_ANON:
            own = _syspath(root, process, fd)
            said.update(own)
            silent = silent or not own
    said.update(filter(None, [_cdev(root, lead.name) for lead in leads if lead.way is Way.VFIO_DEVICE]))
    if silent or not said:
        for group in (lead.name for lead in leads if lead.way is Way.VFIO_GROUP):
            with contextlib.suppress(NotFound):
                said.update(tree.names(root, f"{_GROUPS}/{group}/devices"))
    return sorted(said)


def _syspath(root: Root, process: Process, fd: int) -> list[str]:
    try:
        rows = tree.text(tree.read(root, f"{process.place}/fdinfo/{fd}")).splitlines()
    except Gone:
        return []
    return [row.rsplit("/", 1)[-1] for row in rows if row.startswith("vfio-device-syspath:")]
