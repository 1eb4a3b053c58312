"""IOMMUs, and the address spaces (groups) behind them.

    /sys/class/iommu/NAME/devices/BDF                           the units: dmar0, ivhd0, smmu3.0x..., virtio
    /sys/kernel/iommu_groups/N/type                             identity, blocked, DMA, DMA-FQ, unmanaged...
    /sys/kernel/iommu_groups/N/reserved_regions                 START " " END " " KIND, hexadecimal, END inclusive
    /sys/kernel/iommu_groups/N/devices/BDF

Only Intel's driver shows page tables (:mod:`vtd`); what the others show, or why nothing, is said in ``why_not``.
"""

from __future__ import annotations

from memconsole.backend.kernel import tree, vtd
from memconsole.backend.kernel.tree import Root
from memconsole.errors import BadFile, Denied, NotFound
from memconsole.model import Domain, Iommu, Reserved

_UNITS = "/sys/class/iommu"
_GROUPS = "/sys/kernel/iommu_groups"
_AMD_DEBUGFS = "/sys/kernel/debug/iommu/amd"
LEAVES_MAX = 50_000
"""Page table leaves a survey looks at, over all groups: about 100 ms of them."""
_UNCOUNTED = "too many page table leaves to count them all; ask for this device alone"
_PAGE = 4096

_NO_WALK = {
    "amd-iommu": "the AMD driver shows its device table and registers, but no page tables",
    "arm-smmu": "the Arm SMMU drivers show no page tables",
    "virtio-iommu": "virtio-iommu keeps its mappings in the hypervisor; this kernel has no page tables to show",
}


def units(root: Root = "/") -> tuple[Iommu, ...]:
    """The IOMMUs of this host; empty where there is none.

    Raises:
        Denied, KernelRefused, BadFile: one of them cannot be read.
    """
    try:
        found = tree.names(root, _UNITS)
    except NotFound:
        return ()
    return tuple(_unit(root, name) for name in found)


def domains(root: Root = "/", *, leaves_max: int = LEAVES_MAX) -> tuple[Domain, ...]:
    """The IOMMU groups in order, with their IOVA counted where the kernel shows page tables.

    ``mapped`` is in bytes. Once ``leaves_max`` page table leaves were looked at, the groups left are not counted, and
    say so; with 0 no page table is opened.

    Raises:
        Denied, KernelRefused, BadFile: a group cannot be read.
    """
    try:
        groups = tree.names(root, _GROUPS)
    except NotFound:
        return ()
    of_device = {bdf: unit for unit in units(root) for bdf in unit.devices}
    budget = vtd.Budget(leaves_max)
    found = []
    for name in groups:
        if not name.isdecimal():
            raise tree.malformed(_GROUPS, name)
        found.append(_domain(root, int(name), of_device, budget))
    return tuple(found)


def _unit(root: Root, name: str) -> Iommu:
    base = f"{_UNITS}/{name}"
    try:
        devices = tuple(sorted(tree.names(root, f"{base}/devices")))
    except NotFound:
        devices = ()
    kind = _kind(root, base, name)
    return Iommu(name, kind, devices, _detail(root, base, kind))


def _kind(root: Root, base: str, name: str) -> str:
    """The driver, by the attributes it adds (Intel, AMD) or by the name it gives (Arm, virtio, RISC-V)."""
    for kind in ("intel-iommu", "amd-iommu"):
        if tree.exists(root, f"{base}/{kind}"):
            return kind
    for prefix, kind in (("smmu", "arm-smmu"), ("virtio", "virtio-iommu"), ("riscv", "riscv-iommu")):
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
    if kind == "amd-iommu" and _visible(root, _AMD_DEBUGFS):
        said.append(f"debugfs {', '.join(tree.names(root, _AMD_DEBUGFS))}")
    return ", ".join(said)


def _domain(root: Root, group: int, of_device: dict[str, Iommu], budget: vtd.Budget) -> Domain:
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
        reserved=_reserved(root, f"{base}/reserved_regions"),
        mapped=None if pages is None else pages * _PAGE,
        extents=extents,
        why_not=why_not,
    )


def _reserved(root: Root, source: str) -> tuple[Reserved, ...]:
    found = []
    for row in tree.text(tree.read(root, source)).splitlines():
        try:
            start, end, kind = row.split()
            found.append(Reserved(int(start, 16), int(end, 16) + 1, kind))
        except ValueError as error:
            raise tree.malformed(source, row) from error
    return tuple(found)


def _translation(
    root: Root, kind: str, unit: Iommu | None, devices: tuple[str, ...], budget: vtd.Budget
) -> tuple[int | None, int | None, str]:
    """Pages mapped and runs of IOVA, or why they are not known; devices of a group share one address space."""
    if kind == "identity":
        return None, None, "identity: an IOVA is the physical address"
    if kind == "blocked":
        return 0, 0, "blocked: no DMA reaches memory"
    if unit is None:
        return None, None, "no IOMMU says that it translates for this group"
    if unit.kind != "intel-iommu":
        return None, None, _NO_WALK.get(unit.kind, f"{unit.kind} shows no page tables")
    if not devices:
        return 0, 0, ""
    if budget.leaves <= 0:
        return None, None, _UNCOUNTED
    try:
        return _count(root, devices[0], budget)
    except NotFound:
        return None, None, f"no {vtd.DEBUGFS} (needs CONFIG_INTEL_IOMMU_DEBUGFS, and debugfs mounted)"
    except (Denied, BadFile) as error:
        return None, None, error.why


def _count(root: Root, bdf: str, budget: vtd.Budget) -> tuple[int | None, int | None, str]:
    try:
        with vtd.table(root, bdf, budget) as found:
            return found.pages, len(found), ""
    except vtd.TooMany:
        return None, None, _UNCOUNTED


def _visible(root: Root, path: str) -> bool:
    try:
        return bool(tree.names(root, path))
    except (NotFound, Denied):
        return False
