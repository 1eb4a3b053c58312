"""The same where the kernel has no iommufd: VFIO's own containers, which map from a process that may then die."""

from __future__ import annotations

import json
import os
from pathlib import Path

from support import lab_guest as lab
from support import lab_host as host
from support.edu import BDF as EDU
from support.edu import (
    DST,
    PAGE,
    SIZE,
    SRC,
    Guest,
    found,
    frames,
    grants,
    held,
    refused,
    revoked_while_it_runs,
    started,
    tables,
)
from support.services import services

from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.kernel import procmaps
from memconsole.errors import MemconsoleError

IOMMUFD = Path("/dev/iommu")


def check(name: str, ok: bool, **more: object) -> None:
    lab.say(name, ok, **more)


def kind(keeper: KeeperCustody, guest: str) -> str:
    """What custody says that a guest's address space is made of."""
    fd, payload = keeper.get(f"iommu:{guest}")
    os.close(fd)
    return str(json.loads(payload)["kind"])


with services() as service:
    IOMMUFD.rename("/dev/iommu.away")
    number = Path(f"/sys/bus/pci/devices/{EDU}/iommu_group").readlink().name
    client = started(service)
    for region in ("src", "dst", "other"):
        client.apply(do.Reserve(region, SIZE))
    guest = Guest(service.runtime / "agents")
    service.guests.add(guest.pid)
    client.apply(do.GuestAttach("driver", guest.pid))
    keeper = KeeperCustody(service.runtime / "keeper")

    # --- map
    client.apply(do.Map("src", "driver", gpa=SRC, dma=EDU))
    client.apply(do.Map("dst", "driver", gpa=DST, dma=EDU))
    client.apply(do.WindowMap(f"{EDU}:0", "driver"))
    want = [f"group:{number}", "iommu:driver", f"vfio:{EDU}"]
    check("custody", held(keeper) == want and kind(keeper, "driver") == "type1", held=held(keeper))
    with client.extents("region:src") as src, client.extents("region:dst") as dst:
        known = frames(src, SRC, "rw") | frames(dst, DST, "rw")
    have = tables()
    check("tables", have == known and len(have) == 2 * SIZE // PAGE, have=len(have), want=len(known))
    check("clean", found(client) == [], found=found(client))
    codes = refused(client, do.Map("other", "driver", gpa=0xFEE00000, dma=EDU))
    check("reserved", codes == ["BadIova"], codes=codes)

    # --- the process that mapped dies: the pins keep the pages, DMA goes on, and another one takes it back
    for words in (("wait", "g1"), ("wait", "g2"), ("window", "g3")):
        guest.do(*words)
    window = next(window for window in host.fresh(client).windows if window.id == f"{EDU}:0")
    files = [vma.path for vma in procmaps.vmas("/", guest.pid) if "vfio" in vma.path]
    check("window", guest.pid in window.holders and files == ["anon_inode:[vfio-device]"], files=files)
    known = revoked_while_it_runs(service, client, guest, known)
    client = started(service)
    check("taken-back", tables() == known and set(grants(client)) == {"g1"}, known=list(grants(client)))

    # --- the last grant takes the device and its group with it; somebody else may have them
    client.apply(do.Revoke("g1"))
    guest.do("close")
    client.apply(do.WindowRevoke(f"{EDU}:0"))
    check("closed", held(keeper) == [], held=keeper.names())
    taken = os.open(f"/dev/vfio/{number}", os.O_RDWR)
    try:
        client.apply(do.Map("src", "driver", gpa=SRC, dma=EDU))
        check("taken-group", False)
    except MemconsoleError as error:
        check("taken-group", error.code == "DeviceInUse", error=str(error), remedy=error.remedy)
    os.close(taken)
    check("nothing-left", held(keeper) == [] and not grants(client), held=keeper.names())

    # --- where there is iommufd, that is taken
    Path("/dev/iommu.away").rename(IOMMUFD)
    client.apply(do.Map("src", "driver", gpa=SRC, dma=EDU))
    with client.extents("region:src") as src:
        check("iommufd", kind(keeper, "driver") == "iommufd" and tables() == frames(src, SRC, "rw"))
    keeper.close()
    client.close()
lab.say("end")
