"""IOMMUs, and the address spaces (groups) behind them.

    /sys/class/iommu/NAME/devices/NAME                          the units: dmar0, ivhd0, smmu3.0x..., a BDF (virtio)
    /sys/class/iommu/NAME/device -> .../virtioN                 the device of a virtio-iommu
    /sys/kernel/iommu_groups/N/type                             identity, blocked, DMA, DMA-FQ...: of its default domain
    /sys/kernel/iommu_groups/N/reserved_regions                 START " " END " " KIND, hexadecimal, END inclusive
    /sys/kernel/iommu_groups/N/devices/NAME                     a BDF, or the name of what is no PCI function

Intel's driver shows page tables (:mod:`vtd`), AMD's are walked in physical memory (:mod:`amdvi`); what the others show,
or why nothing, is said in ``why_not``. A group's type does not change while VFIO or iommufd has its devices in another
domain: where page tables can be seen, they say more than it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from memconsole.backend.kernel import amdvi, tree, vtd
from memconsole.backend.kernel.pci import BDF
from memconsole.backend.kernel.tree import Root
from memconsole.backend.kernel.vtd import Budget, NoTable, TooMany
from memconsole.errors import BadFile, Denied, KernelRefused, NotFound
from memconsole.model import Domain, Iommu, Reserved, Unread

if TYPE_CHECKING:
    from memconsole.extents import ExtentTable

_UNITS = "/sys/class/iommu"
_GROUPS = "/sys/kernel/iommu_groups"
LEAVES_MAX = 50_000
"""Page table leaves a survey looks at, over all groups: about 100 ms of them."""
_UNCOUNTED = "too many page table leaves to count them all; ask for this device alone"
_PAGE = 4096
_IDENTITY = "identity: an IOVA is the physical address"

_WALKS: Mapping[str, Callable[[Root, str, Budget | None], ExtentTable]] = {
    "intel-iommu": vtd.table,
    "amd-iommu": amdvi.table,
}
"""Readers of a device's page tables, by the kind of the unit that translates for it."""
_NO_WALK = {
    "arm-smmu": "the Arm SMMU drivers show no page tables",
    "virtio-iommu": "virtio-iommu keeps its mappings in the hypervisor; this kernel has no page tables to show",
}


def units(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Iommu, ...]:
    """The IOMMUs of this host; empty where there is none.

    One that cannot be read is named in ``gaps``; without them it is raised.

    Raises:
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """
    try:
        return tuple(tree.each(root, _UNITS, partial(_unit, root), gaps))
    except NotFound:
        return ()


def domains(root: Root = "/", gaps: list[Unread] | None = None, *, leaves_max: int = LEAVES_MAX) -> tuple[Domain, ...]:
    """The IOMMU groups in order, with their IOVA counted where the kernel shows page tables.

    ``mapped`` is in bytes. Once ``leaves_max`` page table leaves were looked at, the groups left are not counted, and
    say so; with 0 no page table is opened. A group that goes meanwhile is left out, one that cannot be read says why.
    What is no group is named in ``gaps``; the units that cannot be read, :func:`units` names.

    Raises:
        Denied, KernelRefused: the groups or the units cannot be listed. BadFile: without ``gaps``, one is no group.
    """
    of_device = {name: unit for unit in units(root, []) for name in unit.devices}
    budget = Budget(leaves_max)

    def group(name: str) -> Domain:
        if not name.isdecimal():
            raise tree.malformed(_GROUPS, name)
        try:
            return _domain(root, int(name), of_device, budget)
        except (Denied, KernelRefused, BadFile) as error:
            return Domain(int(name), "unknown", "", why_not=f"{error.what}: {error.why}")

    try:
        return tuple(tree.each(root, _GROUPS, group, gaps))
    except NotFound:
        return ()


def table(root: Root, group: str, budget: Budget | None = None) -> ExtentTable:
    """The address space of a group by IOVA page, which the caller closes; all of its devices share it.

    Raises:
        TooMany: the budget, if one is given, does not last.
        NotFound: there is no such group, or its page tables are not shown: why not.
        Denied, KernelRefused, BadFile: they cannot be read.
    """
    what = f"the page tables of IOMMU group {group} are not shown"
    base = f"{_GROUPS}/{group}"
    if not group.isdecimal() or not tree.exists(root, base):
        raise NotFound(
            f"there is no IOMMU group {group}", "this host has none of this number", "memconsole domains lists them"
        )
    devices = tree.names(root, f"{base}/devices")
    unread: list[Unread] = []
    unit = next((unit for unit in units(root, unread) if not set(devices).isdisjoint(unit.devices)), None)
    if unit is None and unread:
        raise NotFound(what, f"its IOMMU may be one that cannot be read: {unread[0].source}: {unread[0].why}")
    kind = tree.line(root, f"{base}/type")
    if why := _not_walked(kind, unit):
        raise NotFound(what, why)
    if not devices:
        raise NotFound(what, "no device is in it")
    assert unit is not None  # noqa: S101 - else there was a reason
    try:
        return _walked(root, kind, unit, _walkable(devices), budget)
    except NotFound as error:
        raise NotFound(what, error.why) from error


def _walkable(devices: Sequence[str]) -> str:
    """The device of a group whose page tables are read, for all share them: a PCI function, if it has one.

    What else has a group is called as its bus calls it (``AMDI0096:00`` of ACPI, ``fd880000.dma-controller``).
    """
    return min(devices, key=lambda name: (BDF.fullmatch(name) is None, name))


def _walked(root: Root, kind: str, unit: Iommu, bdf: str, budget: Budget | None) -> ExtentTable:
    """A device's page tables; NotFound says why they are not shown, or that it has none."""
    from memconsole.extents import ExtentTable

    try:
        return _WALKS[unit.kind](root, bdf, budget)
    except NoTable as error:
        if kind != "identity":  # blocked: VFIO has it, and has attached it to nothing
            return ExtentTable.from_rows(())
        raise NotFound(error.what, _IDENTITY) from error
    except NotFound as error:
        why = error.why or error.what
        if unit.kind == "intel-iommu" and not tree.exists(root, vtd.DEBUGFS):
            why = f"no {vtd.DEBUGFS} (needs CONFIG_INTEL_IOMMU_DEBUGFS, and debugfs mounted)"
        elif unit.kind == "intel-iommu":
            why = f"{vtd.DEBUGFS} has no page tables of {bdf}"
        if kind == "identity" and not why.startswith(kind):
            why = f"identity, unless VFIO has it in a domain of its own: {why}"
        raise NotFound(error.what, why) from error


def _not_walked(kind: str, unit: Iommu | None) -> str:
    """Why there are no page tables to be read for a group of a type, or an empty string."""
    if unit is not None and unit.kind in _WALKS:
        return ""
    if kind == "identity":
        return _IDENTITY
    if unit is None:
        return "no IOMMU says that it translates for this group"
    return _NO_WALK.get(unit.kind, f"{unit.kind} shows no page tables")


def _unit(root: Root, name: str) -> Iommu:
    base = f"{_UNITS}/{name}"
    try:
        devices = tuple(sorted(tree.names(root, f"{base}/devices")))
    except NotFound:
        devices = ()
    kind = _kind(root, base, name)
    return Iommu(name, kind, devices, _detail(root, base, kind))


def _kind(root: Root, base: str, name: str) -> str:
    """The driver, by the attributes it adds (Intel, AMD), the device it has (virtio), or the name it gives (Arm...)."""
    for kind in ("intel-iommu", "amd-iommu"):
        if tree.exists(root, f"{base}/{kind}"):
            return kind
    if (tree.link_name(root, f"{base}/device") or "").startswith("virtio"):
        return "virtio-iommu"
    for prefix, kind in (("smmu", "arm-smmu"), ("riscv", "riscv-iommu"), ("iommufd_selftest", "iommufd-selftest")):
        if name.startswith(prefix):
            return kind
    return "unknown"


def _detail(root: Root, base: str, kind: str) -> str:
    said = []
    for file, label in (("version", "version"), ("cap", "cap"), ("ecap", "ecap"), ("features", "features")):
        try:
            said.append(f"{label} {tree.line(root, f'{base}/{kind}/{file}')}")
        except NotFound:
            continue
    if kind == "amd-iommu" and _visible(root, amdvi.DEBUGFS):
        said.append(f"debugfs {', '.join(tree.names(root, amdvi.DEBUGFS))}")
    return ", ".join(said)


def _domain(root: Root, group: int, of_device: dict[str, Iommu], budget: Budget) -> Domain:
    base = f"{_GROUPS}/{group}"
    devices = tuple(sorted(tree.names(root, f"{base}/devices")))
    kind = tree.line(root, f"{base}/type")
    unit = next((of_device[bdf] for bdf in devices if bdf in of_device), None)
    pages, extents, why_not = _translation(root, kind, unit, devices, budget)
    return Domain(
        group=group,
        kind=kind,
        iommu=unit.name if unit else "",
        devices=devices,
        reserved=reserved(root, str(group)),
        mapped=None if pages is None else pages * _PAGE,
        extents=extents,
        why_not=why_not,
    )


def reserved(root: Root, group: str) -> tuple[Reserved, ...]:
    """IOVA of a group that the IOMMU or the firmware has for itself.

    Raises:
        NotFound: there is no such group. Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"{_GROUPS}/{group}/reserved_regions"
    found = []
    for row in tree.text(tree.read(root, source)).splitlines():
        try:
            start, end, kind = row.split()
            found.append(Reserved(int(start, 16), int(end, 16) + 1, kind))
        except ValueError as error:
            raise tree.malformed(source, row) from error
    return tuple(found)


def _translation(
    root: Root, kind: str, unit: Iommu | None, devices: tuple[str, ...], budget: Budget
) -> tuple[int | None, int | None, str]:
    """Pages mapped and runs of IOVA, or why they are not known; devices of a group share one address space."""
    if kind == "blocked":
        return 0, 0, "blocked: no DMA reaches memory"
    if why := _not_walked(kind, unit):
        return None, None, why
    if unit is None or not devices:
        return 0, 0, ""
    if budget.leaves <= 0:
        return None, None, _UNCOUNTED
    try:
        with _walked(root, kind, unit, _walkable(devices), budget) as found:
            return found.stats().present, len(found), ""
    except TooMany:
        return None, None, _UNCOUNTED
    except (Denied, BadFile, KernelRefused, NotFound) as error:
        return None, None, error.why


def _visible(root: Root, path: str) -> bool:
    try:
        return bool(tree.names(root, path))
    except (NotFound, Denied):
        return False
