"""What keeps a device from going along, brought about and said by its name; the host it was is not refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import lab_guest as lab
import lab_host as host
from msgspec.structs import replace

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody import KeeperCustody
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
    data = bytearray((lab.SHARE / "bzImage").read_bytes())
    start = (data[0x1F1] + 1) * 512 + int.from_bytes(data[0x248:0x24C], "little")
    length = int.from_bytes(data[0x24C:0x250], "little")
    data[start : start + length] = (b"\x7fELF" + b"luo-v5\0memfd-v2\0kho-v4\0").ljust(length, b"\0")
    path = Path("/tmp/bzImage.bare")
    path.write_bytes(data)
    return str(path)


def main() -> None:
    client = host.serve()
    fine = host.action()
    client.apply(do.GuestStart("vm", memory=8 * MIB))
    client.apply(do.Reserve("ring", MIB))

    def against(action: do.HandoffRun = fine) -> list[Condition]:
        """The conditions that do not hold, and are about devices."""
        found = client.plan(action).conditions
        return [each for each in found if not each.ok and ("device-" in each.id or each.id == "command-line-iommu")]

    def said(id: str, severity: Severity, act: Callable[[], list[Condition]] = against) -> None:
        found = act()
        fine = [(each.id, each.severity) for each in found] == [(id, severity)] and found[0].evidence
        lab.say(f"said-{id}", bool(fine), found=[(each.id, each.severity, each.evidence) for each in found])

    def given(bdf: str) -> str:
        return client.apply(do.Map("ring", "vm", gpa=GPA, dma=bdf)).subject

    lab.say("clean-without", against() == [] and not client.plan(fine).refusals, found=str(against()))
    grant = given(ALONE)
    lab.say("clean", against() == [] and not client.plan(fine).refusals, found=str(client.plan(fine).refusals))
    steps = [effect.text for effect in client.plan(fine).effects if effect.id.startswith(("iova", "quiesce"))]
    lab.say("planned", len(steps) == 2, steps=steps)

    # --- the next kernel
    line = fine.append
    without = replace(fine, append=line.replace("intel_iommu=on", ""))
    said("command-line-iommu", Severity.ERROR, lambda: against(without))
    said("device-driver", Severity.ERROR, lambda: against(replace(fine, kernel=without_vfio())))
    modules = Path(f"/lib/modules/{os.uname().release}")
    modules.mkdir(parents=True)
    (modules / "modules.alias").write_text("alias pci:v00001234d000011E8sv*sd*bc*sc*i* edu_host\n")
    said("device-wanted", Severity.WARNING)
    ids = replace(fine, append=f"{line} vfio-pci.ids=8086:1,1234:11e8")
    lab.say("wanted-no-more", against(ids) == [], found=str(against(ids)))
    (modules / "modules.alias").unlink()

    # --- this one
    subprocess.run(["umount", "/sys/kernel/debug"], check=True)
    said("device-hidden", Severity.WARNING)
    subprocess.run(["mount", "-t", "debugfs", "debug", "/sys/kernel/debug"], check=True)
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    device, payload = keeper.get(f"vfio:{ALONE}")
    other = os.memfd_create("no device")
    keeper.put(f"vfio:{ALONE}", other, payload)
    said("device-restless", Severity.ERROR)
    codes = [each.code for each in client.plan(fine).refusals]
    lab.say("refused", codes == ["DeviceRestless"], codes=codes)
    keeper.put(f"vfio:{ALONE}", device, payload)
    os.close(device)
    lab.say("clean-again", against() == [], found=str(against()))
    client.apply(do.Revoke(grant))

    # --- other devices
    for bdf in (TWIN, SIBLING, RESETS):
        free(bdf)
    grant = given(TWIN)
    said("device-beside", Severity.WARNING)
    client.apply(do.Revoke(grant))
    grant = given(RESETS)
    said("device-reset", Severity.WARNING)

    # --- and one that nobody has any more: the keeper lost it, and the control process is another
    client.close()
    served = subprocess.run(["pgrep", "-f", "memconsole serve"], capture_output=True, text=True, check=True).stdout
    os.kill(int(served.split()[0]), 9)
    os.close(other)
    keeper.drop(f"vfio:{RESETS}")
    keeper.close()
    client = host.serve()
    said("device-lost", Severity.ERROR)
    client.apply(do.Revoke(grant))
    lab.say("clean-at-last", against() == [] and not client.plan(fine).refusals, found=str(against()))
    lab.say("end")


main()
