"""Conditions of a handoff for the devices that guests have: on this side of the jump, and on the other."""

from __future__ import annotations

from collections.abc import Iterator

from memconsole.backend.handoff.facts import HandoffFacts
from memconsole.backend.kernel import cmdline
from memconsole.model import Condition, Severity

_OF_IOMMUS = ("iommu.", "vfio_iommu_type1.", "iommufd.", "arm_smmu.", "arm_smmu_v3.")


def devices(facts: HandoffFacts) -> Iterator[Condition]:
    """What devices need on this side, at a rehearsal too."""
    found = facts.devices
    yield Condition(
        "device-lost",
        Severity.ERROR,
        not any(each.lost for each in found),
        requirement="custody holds every device that a grant is for, and it works",
        risk="the device cannot be given back, and its guest stays paused",
        observed="; ".join(f"device {each.bdf} of guest {each.guest}: {each.lost}" for each in found if each.lost),
        remedy="revoke its grants and map them again with --dma; of a held guest: memconsole guest resume NAME",
    )
    yield Condition(
        "device-restless",
        Severity.ERROR,
        not any(each.restless for each in found),
        requirement="bus mastering can be switched off for every device",
        risk="a device that goes on writing during the jump overwrites memory of the next kernel",
        observed="; ".join(f"device {each.bdf} keeps the bus: {each.restless}" for each in found if each.restless),
        remedy="revoke its grants first: that closes the device",
    )
    active = "; ".join(
        f"device {each.bdf} shares its IOMMU group with {', '.join(each.active)}" for each in found if each.active
    )
    yield Condition(
        "device-group",
        Severity.ERROR,
        not active,
        requirement="no kernel driver has another device of a granted device's IOMMU group",
        risk="VFIO opens no device of such a group: the device does not come back",
        observed=active,
        remedy="take the other device from its driver: echo BDF > /sys/bus/pci/devices/BDF/driver/unbind",
    )
    hidden = [each for each in found if each.hidden]
    yield Condition(
        "device-hidden",
        Severity.WARNING,
        not hidden,
        requirement="the kernel shows the page tables of every device",
        risk="where a device leads is compared with the ledger alone, which proves less",
        observed=f"the page tables of device {hidden[0].bdf} cannot be read: {hidden[0].hidden}" if hidden else "",
        remedy="mount debugfs; a kernel with CONFIG_INTEL_IOMMU_DEBUGFS shows them",
    )


def device_conditions(facts: HandoffFacts) -> Iterator[Condition]:
    """What devices need on the other side; where there are none, it is no matter."""
    found = facts.devices
    yield _drivers(facts)
    words = cmdline.parse(facts.line)
    gone = [word for word in cmdline.parse(facts.here) if found and _is_of_iommus(word) and word not in words]
    named = " ".join(map(str, gone))
    yield Condition(
        "command-line-iommu",
        Severity.ERROR,
        not gone,
        requirement="the next kernel's command line repeats the IOMMU's settings of this one",
        risk="the next kernel may run no IOMMU: no device can be given to a guest",
        observed=f"the command line lacks {named}" if gone else "",
        remedy=f'add it: --append "... {named}"',
    )
    wanted = "; ".join(f"device {each.bdf} is claimed by {', '.join(each.wanted)}" for each in found if each.wanted)
    yield Condition(
        "device-wanted",
        Severity.WARNING,
        not wanted,
        requirement="no driver of the next kernel claims a granted device",
        risk="a driver that binds the device first resets it, and its guest waits",
        observed=wanted,
        remedy='give it to vfio-pci as it boots: --append "... vfio-pci.ids=VENDOR:DEVICE"',
    )
    shared = "; ".join(
        f"device {each.bdf} shares its IOMMU group with {', '.join(each.beside)}" for each in found if each.beside
    )
    yield Condition(
        "device-beside",
        Severity.WARNING,
        not shared,
        requirement="every granted device is alone in its IOMMU group",
        risk="a driver that binds another device of the group in the next kernel keeps VFIO from opening this one",
        observed=shared,
        remedy="let no driver bind those in the next kernel (vfio-pci.ids=, modprobe.d), or use a slot with ACS",
    )
    resets = ", ".join(each.bdf for each in found if each.resets)
    yield Condition(
        "device-reset",
        Severity.WARNING,
        not resets,
        requirement="every device keeps its registers",
        risk="a device that can be reset is reset when it is opened again",
        observed=f"devices that will be reset: {resets}" if resets else "",
        remedy="the guest's driver must set the device up anew, as after a reset",
    )


def _drivers(facts: HandoffFacts) -> Condition:
    if facts.missing is None:
        observed = "the next kernel's image does not say which modules it has"
    else:
        observed = f"the next kernel lacks {', '.join(facts.missing)}" if facts.missing else ""
    return Condition(
        "device-driver",
        Severity.ERROR if facts.missing is not None else Severity.WARNING,
        facts.missing == (),
        requirement="the next kernel has vfio-pci and iommufd",
        risk="without them no device comes back, and its guest stays paused",
        observed=observed,
        remedy="choose a kernel with VFIO_PCI, VFIO_DEVICE_CDEV and IOMMUFD, or revoke the devices' grants",
    )


def _is_of_iommus(word: cmdline.BootParameter) -> bool:
    return word.name in {"iommu", "intel_iommu", "amd_iommu"} or word.name.startswith(_OF_IOMMUS)
