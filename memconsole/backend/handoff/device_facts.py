"""What is known of the devices that reach guests' memory, before a handoff carries them: nothing is changed.

grants               the ledger's, of a guest for a device          custody    ``vfio:BDF``, quiet or not
IOMMU group          who else is in it, and with which driver       VFIO       can it be quiesced, is it reset
PRESERVE_FD          tried in a session that is thrown away         debugfs    are its page tables shown
next kernel          is vfio-pci in its image or below /lib/modules/RELEASE; which modules there want the device
                     (modules.alias: "alias pci:v..." patterns against the device's modalias)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from memconsole.backend.dma import vfio
from memconsole.backend.handoff import devices
from memconsole.backend.handoff.facets import DeviceLookups
from memconsole.backend.handoff.image import KernelImage
from memconsole.backend.kernel import cmdline, iommu, pci, tree, vtd
from memconsole.errors import MemconsoleError, NotFound
from memconsole.model import Device

if TYPE_CHECKING:
    from memconsole.backend.handoff.powers import Powers

NEEDED = ("vfio_pci", "iommufd")
"""Modules without which no device comes back."""
_ALIAS = re.compile(r"alias (pci:\S+) (\S+)")


@dataclass(frozen=True)
class DeviceFacts:
    """A device that reaches a guest's memory, and what speaks against its coming along; empty where nothing does.

    ``lost``: it is in nobody's custody; ``restless``: it cannot be quiesced; ``active`` and ``beside``: who else is in
    its group, with a driver or without; ``hidden``: its page tables are not shown; ``wanted``: modules that may take it
    in the next kernel; ``unpreserved``: why the kernel does not carry it (None: it was not asked).
    """

    bdf: str
    guest: str
    grants: tuple[str, ...]
    lost: str = ""
    restless: str = ""
    active: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    hidden: str = ""
    resets: bool = False
    wanted: tuple[str, ...] = ()
    unpreserved: str | None = None


def gather_devices(
    desk: DeviceLookups, image: KernelImage | None, line: str, powers: Powers, *, jump: bool
) -> tuple[DeviceFacts, ...]:
    """Look at every device that a grant is for.

    Raises:
        Denied, KernelRefused, BadFile: the devices of this host cannot be read.
    """
    given = devices.granted_devices(desk)
    if not given:
        return ()
    found = []
    for bdf, guest in given.items():
        if guest in desk.address_spaces.vmm_filled and not jump:
            continue  # its VMM binds it once, and goes on
        try:
            inside = pci.in_group(desk.root, bdf)
        except NotFound:
            inside = ()
        seen = _device_facts(desk, bdf, guest, inside)
        if jump and not seen.lost:
            wanted = taking_modules(desk.root, inside[0], image.release, line) if image is not None else ()
            seen = replace(seen, wanted=wanted, unpreserved=devices.cannot_preserve(desk, bdf, powers))
        found.append(seen)
    return tuple(found)


def _device_facts(desk: DeviceLookups, bdf: str, guest: str, inside: Sequence[Device]) -> DeviceFacts:
    """``inside``: the device and the others of its group; none if it is gone."""
    grants = tuple(grant.id for grant in desk.state.grants_of(guest=guest) if grant.dma == bdf)
    lost = ""
    if not inside:
        lost = "the device is gone"
    elif desk.address_spaces.devices.get(bdf) != guest:
        lost = "it is not in custody"
    elif guest in desk.address_spaces.vmm_filled and desk.live_guest(guest) is None:
        lost = "its VMM ended and still has it open"
    elif bdf in desk.address_spaces.quiesced:
        lost = "bus mastering is off since the last handoff"
    if lost:
        return DeviceFacts(bdf, guest, grants, lost=lost)
    restless, resets = "", False
    try:
        with desk.address_spaces.borrowed_fds(bdf) as (device, _):
            vfio.masters(device)
            resets = vfio.resets(device)
    except MemconsoleError as error:
        restless = str(error)
    beside = [each for each in inside[1:] if not pci.is_bridge(each)]
    passive = [each for each in beside if each.driver in vfio.PASSIVE]
    return DeviceFacts(
        bdf,
        guest,
        grants,
        restless=restless,
        active=tuple(f"{each.bdf} ({each.driver})" for each in beside if each.driver not in vfio.PASSIVE),
        beside=tuple(each.bdf for each in passive if each.bdf not in desk.address_spaces.devices),
        hidden=_hidden(desk.root, bdf),
        resets=resets,
    )


def _hidden(root: tree.Root, bdf: str) -> str:
    """Why a device's page tables are not shown; one leaf of them is enough to know that they are."""
    try:
        iommu.table(root, pci.iommu_group(root, bdf), vtd.Budget(1)).close()
    except vtd.TooMany:
        return ""
    except tree.UNREADABLE as error:
        return str(error)
    return ""


def missing_modules(image: KernelImage | None, root: tree.Root) -> tuple[str, ...] | None:
    """The modules devices need that the next kernel has neither built in nor below /lib/modules; None: nobody knows."""
    if image is None:
        return None
    built = set(image.modules or ())
    there: str | None = None
    for name in ("modules.builtin", "modules.dep"):
        try:
            there = (there or "") + tree.text(tree.read(root, f"/lib/modules/{image.release}/{name}", limit=64 << 20))
        except tree.UNREADABLE:
            continue
    if image.modules is None and there is None:
        return None
    text = (there or "").replace("-", "_")
    return tuple(each for each in NEEDED if each not in built and f"/{each}.ko" not in text)


def taking_modules(root: tree.Root, device: Device, release: str, line: str) -> tuple[str, ...]:
    """The modules of a kernel that take such a device, unless its command line gives it to vfio-pci."""
    given = cmdline.values(cmdline.parse(line), "vfio_pci.ids")[-1:]
    if any((device.vendor, device.device) in _ids(value) for value in given):
        return ()
    try:
        alias = tree.line(root, f"/sys/bus/pci/devices/{device.bdf}/modalias")
        text = tree.text(tree.read(root, f"/lib/modules/{release}/modules.alias", limit=64 << 20))
    except tree.UNREADABLE:
        return ()
    starts = (f"pci:v{device.vendor:08X}", "pci:v*")
    found = {
        match[2] for match in _ALIAS.finditer(text) if match[1].startswith(starts) and fnmatchcase(alias, match[1])
    }
    return tuple(sorted(found))


def _ids(value: str) -> set[tuple[int, int]]:
    """Vendor and device of each ``VENDOR:DEVICE[:...]`` in vfio-pci's list; what is none, the driver leaves out too."""
    found = set()
    for each in value.split(","):
        vendor, _, rest = each.partition(":")
        with contextlib.suppress(ValueError):
            found.add((int(vendor, 16), int(rest.partition(":")[0], 16)))
    return found
