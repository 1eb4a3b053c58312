"""What ``map --dma`` adds to ``map``, and what taking a grant back begins with where a device has it too.

map      bind      vfio-pci takes the device, if no driver has it
         attach    the device is attached to the guest's address space: it reaches what its grants say
         (offer)   the guest maps it
         dma       the device reaches it, at the guest's own addresses
start    bind      ... the same
         hand      the device, and an iommufd for it, are opened for a VMM
         (spawn)   the VMM confines the device, and lets it reach its RAM
revoke,  dma       no device reaches it any more; it is not undone if the guest then keeps its own mapping
stop     (cut...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from msgspec.structs import replace

from memconsole.actions import GuestStart
from memconsole.backend import needs
from memconsole.backend.dma import iommufd, type1, vfio
from memconsole.backend.kernel import iommu, pci, tree
from memconsole.backend.work import PreparedAction
from memconsole.errors import MemconsoleError
from memconsole.model import Grant
from memconsole.units import format_address, format_size


def refuse_device(work: PreparedAction, desk: needs.DeviceReaching, grant: Grant, bdf: str) -> None:
    """Refuse what no device can be given, or not this one: each reason by its name."""
    if not _can_confine(work, desk, bdf):
        return
    if grant.gpa is None:
        why = "a device addresses memory by guest physical address"
        work.refuse("NoGpa", f"device {bdf} cannot be given memory", why, "add --gpa")
        return
    _group(work, desk, grant.guest, bdf)
    _reserved(work, desk, grant, bdf, grant.gpa)


def refuse_handing(work: PreparedAction, desk: needs.DeviceReaching, action: GuestStart) -> None:
    """Refuse a device that a VMM cannot be started with; where its RAM lies, and what it leaves out, is its own."""
    bdf = action.device
    if bdf is None:
        return
    what = f"guest {action.name} cannot be given device {bdf}"
    if action.vmm != "qemu":
        work.refuse("NoDevices", what, f"{action.vmm} has no drivers for it", "start it with --vmm qemu")
    elif _can_confine(work, desk, bdf):
        _group(work, desk, action.name, bdf)
        if not tree.exists(desk.root, iommufd.DEVICE):
            why = f"QEMU takes an open device with {iommufd.DEVICE} only (CONFIG_IOMMUFD, CONFIG_VFIO_DEVICE_CDEV)"
            work.refuse("NoIommu", what, why, "modprobe iommufd")


def _can_confine(work: PreparedAction, desk: needs.HostTree, bdf: str) -> bool:
    """Whether this host confines devices, and this one, or a refusal."""
    root = desk.root
    base = f"/sys/bus/pci/devices/{bdf}"
    what = f"device {bdf} cannot be given memory"
    if not tree.exists(root, base):
        work.refuse(
            "NoSuchDevice",
            f"there is no device {bdf}",
            "this host has no such PCI function",
            "memconsole devices lists them",
        )
    elif not tree.exists(root, f"{base}/iommu_group"):
        why = "no IOMMU confines it: it would reach all of the host's memory"
        remedy = "boot with intel_iommu=on or amd_iommu=on, with VT-d or AMD-Vi enabled in the firmware"
        work.refuse("NoIommu", what, why, remedy)
    elif not tree.exists(root, iommufd.DEVICE) and not tree.exists(root, type1.CONTAINER):
        why = f"this kernel has neither {iommufd.DEVICE} (CONFIG_IOMMUFD) nor {type1.CONTAINER} (CONFIG_VFIO_CONTAINER)"
        work.refuse("NoIommu", what, why, "modprobe iommufd, or vfio_iommu_type1")
    elif not tree.exists(root, f"/sys/bus/pci/drivers/{vfio.DRIVER}"):
        work.refuse("NoVfio", what, f"there is no driver {vfio.DRIVER}", f"modprobe {vfio.DRIVER}")
    else:
        return True
    return False


def _group(work: PreparedAction, desk: needs.DeviceReaching, guest: str, bdf: str) -> None:
    """Everything in a group reaches what one of it reaches: no driver and no other guest may have any of it."""
    inside = pci.in_group(desk.root, bdf)
    for device in inside:
        if device.driver not in vfio.PASSIVE and (device.bdf == bdf or not pci.is_bridge(device)):
            also = "" if device.bdf == bdf else f", which is in IOMMU group {device.group} with {bdf},"
            work.refuse(
                "DeviceInUse",
                f"device {device.bdf}{also} is in use",
                f"the kernel's {device.driver} has it",
                f"echo {device.bdf} > /sys/bus/pci/devices/{device.bdf}/driver/unbind",
            )
    attached = desk.address_spaces.devices
    for device in inside:
        owner = attached.get(device.bdf, guest)
        if owner != guest:
            why = f"guest {owner} has device {device.bdf} of IOMMU group {device.group}"
            remedy = (
                f"memconsole guest stop {owner}" if owner in desk.address_spaces.vmm_filled else "revoke its grants"
            )
            work.refuse("DeviceInUse", f"device {bdf} cannot be given to {guest}", why, remedy)


def _reserved(work: PreparedAction, desk: needs.HostTree, grant: Grant, bdf: str, gpa: int) -> None:
    """Refuse IOVA that the IOMMU or the firmware has for itself."""
    for reserved in iommu.reserved(desk.root, pci.iommu_group(desk.root, bdf)):
        if gpa < reserved.end and reserved.start < gpa + grant.length:
            where = f"{format_address(reserved.start)}-{format_address(reserved.end)}"
            work.refuse(
                "BadIova",
                f"{grant.id} cannot be mapped there for {bdf}",
                f"{where} is {reserved.kind}",
                "choose another --gpa",
            )


def attach_device(work: PreparedAction, desk: needs.DeviceReaching, grant: Grant, bdf: str) -> None:
    """The steps before the guest maps it: after them the device is confined to the guest's address space."""
    _bind(work, desk, bdf)
    if desk.address_spaces.devices.get(bdf) != grant.guest:
        text = f"attach device {bdf} to the address space of {grant.guest}"
        work.step(
            "attach",
            text,
            _or_reconciled(desk, partial(desk.address_spaces.attach, grant.guest, bdf)),
            desk.address_spaces.reconcile,
            "close it",
        )


def hand_device(work: PreparedAction, desk: needs.DeviceReaching, grant: Grant) -> None:
    """The steps before a VMM starts with a device: after them custody has it, and it reaches nothing yet."""
    bdf = grant.dma
    if bdf is None:
        return
    _bind(work, desk, bdf)
    text = f"open device {bdf} and an iommufd that confines it to {grant.guest}"
    work.step(
        "hand",
        text,
        _or_reconciled(desk, partial(desk.address_spaces.hand_device, grant.guest, bdf)),
        desk.address_spaces.reconcile,
        "close both",
    )


def _bind(work: PreparedAction, desk: needs.HostTree, bdf: str) -> None:
    if vfio.driver(desk.root, bdf) is None:
        text = f"bind device {bdf} to {vfio.DRIVER}"
        undo = partial(vfio.unbind, desk.root, bdf)
        work.step("bind", text, partial(vfio.bind, desk.root, bdf), undo, "unbind it")


def _or_reconciled(desk: needs.DeviceReaching, do: Callable[[], None]) -> Callable[[], None]:
    """The same, of which nothing is left when it fails."""

    def tried() -> None:
        try:
            do()
        except MemconsoleError:
            desk.address_spaces.reconcile()
            raise

    return tried


def reach_grant(work: PreparedAction, desk: needs.DeviceReaching, grant: Grant, bdf: str) -> None:
    """The step after the guest maps it: its devices reach it."""
    at = "" if grant.gpa is None else f" at IOVA {format_address(grant.gpa)}"
    text = f"let device {bdf} reach {format_size(grant.length)} of {grant.region}{at}, pages pinned"
    work.step("dma", text, lambda: desk.address_spaces.map(grant), lambda: desk.address_spaces.unmap(grant), "unmap it")


def cut_grants(work: PreparedAction, desk: needs.DeviceReaching, grants: Sequence[Grant]) -> None:
    """The step that takes grants from devices, before anybody else is asked; none where no device has any."""
    given = [grant for grant in grants if grant.dma is not None]
    if not given:
        return

    def do() -> None:
        for grant in given:
            desk.address_spaces.unmap(grant)
            work.lasting = replace(work.lasting, grants=(*work.lasting.grants, replace(grant, dma=None)))

    names = ", ".join(f"{grant.id} from {grant.dma}" for grant in given)
    work.step("dma", f"unmap {names}", do)
