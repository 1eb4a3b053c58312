"""What keeps a device from going along, brought about and said by its name; the host it was is not refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from msgspec.structs import replace
from support import lab_guest as lab
from support import lab_host as host

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import vfio
from memconsole.model import Condition, Severity

MIB = 1 << 20
ALONE, TWIN, SIBLING, RESETS = "0000:00:04.0", "0000:00:06.0", "0000:00:06.1", "0000:01:00.0"
GPA = 0x10000000


def free(bdf: str) -> None:
    """Take a device from its driver, if one has it."""
    driver = Path(f"/sys/bus/pci/devices/{bdf}/driver")
    if driver.exists() and driver.resolve().name != vfio.DRIVER:
        (driver / "unbind").write_text(bdf)


def without_vfio() -> str:
    """A kernel that speaks the ABIs and has neither vfio-pci nor iommufd."""
    return lab.image_of((b"\x7fELF" + b"luo-v5\0memfd-v2\0kho-v4\0").ljust(4096, b"\0"), "/tmp/bzImage.bare")


class Host:
    """The host of a VM with one device granted, and a handoff that nothing speaks against unless a test has it so."""

    def __init__(self) -> None:
        self.client = host.serve()
        self.fine = host.action()
        self.client.apply(do.GuestStart("vm", memory=8 * MIB))
        self.client.apply(do.Reserve("ring", MIB))

    def against(self, action: do.HandoffRun | None = None) -> list[Condition]:
        """The conditions that do not hold, and are about devices."""
        found = host.plan(self.client, action or self.fine).conditions
        return [each for each in found if not each.ok and ("device-" in each.id or each.id == "command-line-iommu")]

    def said(self, id: str, severity: Severity, action: do.HandoffRun | None = None) -> None:
        """One condition, and no other, speaks against it."""
        found = self.against(action)
        alone = [(each.id, each.severity) for each in found] == [(id, severity)] and found[0].observed
        lab.say(f"said-{id}", bool(alone), found=[(each.id, each.severity, each.observed) for each in found])

    def clean(self, verdict: str) -> None:
        """Nothing does."""
        refusals = host.plan(self.client, self.fine).refusals
        lab.say(verdict, self.against() == [] and not refusals, found=str((self.against(), refusals)))

    def given(self, bdf: str) -> str:
        """Let a device reach the ring; the grant."""
        return self.client.apply(do.Map("ring", "vm", gpa=GPA, dma=bdf)).subject


def the_next_kernel(here: Host) -> None:
    line = here.fine.append
    here.said("command-line-iommu", Severity.ERROR, replace(here.fine, append=line.replace("intel_iommu=on", "")))
    here.said("device-driver", Severity.ERROR, replace(here.fine, kernel=without_vfio()))
    modules = Path(f"/lib/modules/{os.uname().release}")
    modules.mkdir(parents=True)
    (modules / "modules.alias").write_text("alias pci:v00001234d000011E8sv*sd*bc*sc*i* edu_host\n")
    here.said("device-wanted", Severity.WARNING)
    ids = replace(here.fine, append=f"{line} vfio-pci.ids=8086:1,1234:11e8")
    lab.say("wanted-no-more", here.against(ids) == [], found=str(here.against(ids)))
    (modules / "modules.alias").unlink()


def this_one(here: Host, keeper: KeeperCustody) -> None:
    subprocess.run(["umount", "/sys/kernel/debug"], check=True)
    here.said("device-hidden", Severity.WARNING)
    subprocess.run(["mount", "-t", "debugfs", "debug", "/sys/kernel/debug"], check=True)
    device, payload = keeper.get(f"vfio:{ALONE}")
    other = os.memfd_create("no device")
    keeper.put(f"vfio:{ALONE}", other, payload)
    os.close(other)
    here.said("device-restless", Severity.ERROR)
    codes = [each.code for each in here.client.plan(here.fine).refusals]
    lab.say("refused", codes == ["DeviceRestless"], codes=codes)
    keeper.put(f"vfio:{ALONE}", device, payload)
    os.close(device)
    here.clean("clean-again")


def other_devices(here: Host) -> str:
    """A device that shares a group, and one that cannot be reset: whose grant it is."""
    for bdf in (TWIN, SIBLING, RESETS):
        free(bdf)
    grant = here.given(TWIN)
    here.said("device-beside", Severity.WARNING)
    here.client.apply(do.Revoke(grant))
    grant = here.given(RESETS)
    here.said("device-reset", Severity.WARNING)
    return grant


def one_that_is_lost(here: Host, keeper: KeeperCustody, grant: str) -> None:
    """The keeper lost a device, and the control process is another."""
    here.client.close()
    served = subprocess.run(["pgrep", "-f", "memconsole serve"], capture_output=True, text=True, check=True).stdout
    os.kill(int(served.split()[0]), 9)
    keeper.drop(f"vfio:{RESETS}")
    keeper.close()
    here.client = host.serve()
    here.said("device-lost", Severity.ERROR)
    here.client.apply(do.Revoke(grant))
    here.clean("clean-at-last")


def main() -> None:
    here = Host()
    here.clean("clean-without")
    grant = here.given(ALONE)
    here.clean("clean")
    effects = here.client.plan(here.fine).effects
    steps = [effect.text for effect in effects if effect.id.startswith(("iova", "quiesce"))]
    lab.say("planned", len(steps) == 2, steps=steps)
    the_next_kernel(here)
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    this_one(here, keeper)
    here.client.apply(do.Revoke(grant))
    one_that_is_lost(here, keeper, other_devices(here))
    lab.say("end")


main()
