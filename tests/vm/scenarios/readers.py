"""The kernel readers on a host with LUO, KHO, an Intel IOMMU with page tables in debugfs, and SVM."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
from support import lab_guest as lab

from memconsole.backend.diagnose.doctor import doctor
from memconsole.backend.kernel import census, iommu, kho, pci

EDU = "0000:00:04.0"


def bind_edu_to_vfio() -> None:
    """Give the edu device to vfio-pci, the kernel's own way."""
    Path(f"/sys/bus/pci/devices/{EDU}/driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(EDU)


MAP = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_SYNC)
memory = mmap.mmap(fd, 4096, offset=int(sys.argv[2]))
if len(sys.argv) > 3:
    memory.close()
print("maps", flush=True)
sys.stdin.read()
"""


def told_by_what_they_are() -> None:
    """A BAR's file bound to another place and of another sysfs, and a copied node of /dev/mem: each has the BAR."""
    edu = pci.function("/", EDU)
    bar = next(bar for bar in edu.bars if bar.bar == 0)
    place = f"devices/pci0000:00/{EDU}/resource0"
    os.mknod("/tmp/memory", 0o600 | stat.S_IFCHR, os.makedev(1, 1))
    ways: dict[str, tuple[list[str], str, list[object]]] = {
        "bound": (["unshare", "-m"], f"touch /tmp/bar; mount --bind /sys/{place} /tmp/bar", ["/tmp/bar", 0]),
        "other": (["unshare", "-mn"], "mkdir -p /tmp/s; mount -t sysfs s /tmp/s", [f"/tmp/s/{place}", 0]),
        "copied": ([], "true", ["/tmp/memory", bar.start]),
        "held": ([], "true", ["/tmp/memory", bar.start, "close"]),
    }
    with contextlib.ExitStack() as ends:
        pids = {}
        for name, (alone, first, words) in ways.items():
            python = shlex.join([sys.executable, "-c", MAP, *map(str, words)])
            command = [*alone, "sh", "-c", f"{first} && exec {python}"]
            process = ends.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            ends.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == b"maps\n", name
            pids[process.pid] = name
        seen = census.take()
        mapping = [pids.get(pid, str(pid)) for pid in pci.holders(seen, [edu]).get(bar.id, ())]
        may = [name for pid, name in pids.items() if pci.may_map(seen, seen.processes[pid], bar)]
    right = sorted(mapping) == ["bound", "copied", "other"] and may == list(ways)
    lab.say("bar-files", right, mapping=mapping, may=may)


levels = {capability.id: capability.level for capability in doctor()}
lab.say("doctor", levels=levels)
survival = kho.survival()
lab.say("survival", survival.kho and survival.luo, **msgspec.to_builtins(survival))
lab.say("units", any(unit.name == "dmar0" for unit in iommu.units()), units=iommu.units())
domains = iommu.domains()
lab.say("domains", bool(domains), domains=msgspec.to_builtins(domains))
if lab.stage() == 1:
    told_by_what_they_are()
    bind_edu_to_vfio()
    functions = [function.device for function in pci.functions() if function.device.bdf == EDU]
    lab.say("edu", functions[0].driver == "vfio-pci", device=str(functions))
    command = [str(Path(sys.executable).parent / "memconsole"), "--embedded", "snapshot"]
    taken = subprocess.run(command, capture_output=True, text=True, check=False)
    lab.say("snapshot", taken.returncode == 0, out=taken.stdout[-30000:], err=taken.stderr[-2000:], uid=os.geteuid())
    lab.load()
    lab.jump()
lab.say("end")
