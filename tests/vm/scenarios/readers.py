"""The kernel readers on a host with LUO, KHO, an Intel IOMMU with page tables in debugfs, and SVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lab_guest as lab
import msgspec

from memconsole.backend.doctor import doctor
from memconsole.backend.kernel import iommu, kho, pci

EDU = "0000:00:04.0"


def bind_edu_to_vfio() -> None:
    """Give the edu device to vfio-pci, the kernel's own way."""
    Path(f"/sys/bus/pci/devices/{EDU}/driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(EDU)


levels = {capability.id: capability.level for capability in doctor()}
lab.say("doctor", levels=levels)
survival = kho.survival()
lab.say("survival", survival.kho and survival.luo, **msgspec.to_builtins(survival))
lab.say("units", any(unit.name == "dmar0" for unit in iommu.units()), units=iommu.units())
domains = iommu.domains()
lab.say("domains", bool(domains), domains=msgspec.to_builtins(domains))
if lab.stage() == 1:
    bind_edu_to_vfio()
    functions = [function.device for function in pci.functions() if function.device.bdf == EDU]
    lab.say("edu", functions[0].driver == "vfio-pci", device=str(functions))
    command = [Path(sys.executable).parent / "memconsole", "--embedded", "snapshot"]
    taken = subprocess.run(command, capture_output=True, text=True, check=False)
    lab.say("snapshot", taken.returncode == 0, out=taken.stdout[-30000:], err=taken.stderr[-2000:], uid=os.geteuid())
    lab.load()
    lab.jump()
lab.say("end")
