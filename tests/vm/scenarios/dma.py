"""A guest with a device of its own: a process drives edu through its window, and its memory through DMA."""

from __future__ import annotations

import json
import os

from support import lab_guest as lab
from support import lab_host as host
from support.edu import BDF as EDU
from support.edu import (
    DST,
    PAGE,
    SIZE,
    SRC,
    Guest,
    dies,
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
from memconsole.backend.dma import iommufd, vfio
from memconsole.backend.kernel import procmaps
from memconsole.errors import MemconsoleError
from memconsole.extents import ExtentTable


def check(name: str, ok: bool, **more: object) -> None:
    lab.say(name, ok, **more)


with services() as service:
    client = started(service)
    for region in ("src", "dst", "other"):
        client.apply(do.Reserve(region, SIZE))
    guest = Guest(service.runtime / "agents")
    service.guests.add(guest.pid)
    client.apply(do.GuestAttach("driver", guest.pid))
    client.apply(do.GuestAttach("second", os.getpid()))

    # --- what is refused, each by its name
    used = next(
        device.bdf
        for device in client.snapshot().devices
        if device.driver not in {None, "pcieport"} and device.group is not None
    )
    check("in-use", refused(client, do.Map("src", "driver", gpa=SRC, dma=used)) == ["DeviceInUse"], bdf=used)
    check("no-gpa", refused(client, do.Map("src", "driver", dma=EDU)) == ["NoGpa"])
    msi = refused(client, do.Map("src", "driver", gpa=0xFEE00000, dma=EDU))
    check("reserved", msi == ["BadIova"], codes=msi)

    # --- map
    steps = [effect.id for effect in client.plan(do.Map("src", "driver", gpa=SRC, dma=EDU)).effects]
    check("steps", steps == ["bind", "attach", "offer", "dma"], steps=steps)
    client.apply(do.Map("src", "driver", gpa=SRC, dma=EDU))
    client.apply(do.Map("dst", "driver", gpa=DST, dma=EDU))
    client.apply(do.WindowMap(f"{EDU}:0", "driver"))
    check("driver", vfio.driver("/", EDU) == "vfio-pci")
    codes = refused(client, do.WindowMap(f"{EDU}:0", "second"))
    check("window-twice", codes == ["DeviceInUse", "Granted"], codes=codes)
    codes = refused(client, do.Map("other", "second", gpa=SRC, dma=EDU))
    check("device-twice", codes == ["DeviceInUse"], codes=codes)

    with client.extents("region:src") as src, client.extents("region:dst") as dst:
        want = frames(src, SRC, "rw") | frames(dst, DST, "rw")
    have = tables()
    check("tables", have == want and len(have) == 2 * SIZE // PAGE, have=len(have), want=len(want))

    # --- DMA through the region, revoked while it runs
    said = guest.do("wait", "g1"), guest.do("wait", "g2"), guest.do("window", "g3")
    window = next(window for window in host.fresh(client).windows if window.id == f"{EDU}:0")
    files = [vma.path for vma in procmaps.vmas("/", guest.pid) if "vfio" in vma.path]
    check("window", guest.pid in window.holders and len(files) == 1, files=files, holders=window.holders)
    check("edu", said == ("done", "done", "0x10000ed"), said=said)
    want = revoked_while_it_runs(service, client, guest, want)
    client = started(service, "revoke.dma.after")
    check("taken-back", tables() == want and set(grants(client)) == {"g1"}, known=list(grants(client)))

    # --- what the device reaches behind the control process's back (the next one closes it)
    client.apply(do.Map("other", "driver", gpa=DST, dma=EDU))
    keeper = KeeperCustody(service.runtime / "keeper")
    space, payload = keeper.get("iommu:driver")
    stray = os.memfd_create("stray")
    os.ftruncate(stray, PAGE)
    number = json.loads(payload)["space"]
    iommufd.map_file(space, number, iommufd.Mapping(stray, 0, PAGE, 0x20000000, True))
    check("found-unknown", ("dma-unknown", EDU) in found(client), found=found(client))
    os.close(space)

    # --- it dies when the device was cut off, and the guest was not
    check("died-revoking", dies(service, client, do.Revoke("g5")))
    client = started(service)
    check("carried-through", set(grants(client)) == {"g1"}, known=list(grants(client)))
    check("settled", tables() == want and found(client) == [], found=found(client))

    # --- without grants it reaches nothing; the window, which is a part of its file, takes it along
    client.apply(do.Revoke("g1"))
    check("nothing-left", not [grant for grant in grants(client).values() if grant.dma])
    check("reaches-nothing", tables() == {} and held(keeper) == ["iommu:driver", f"vfio:{EDU}"], held=held(keeper))
    guest.do("close")
    client.apply(do.WindowRevoke(f"{EDU}:0"))
    check("closed", held(keeper) == [], held=keeper.names())

    # --- another guest has the device; it is stopped with it
    client.apply(do.GuestStart("vm", memory=SIZE))
    client.apply(do.Map("src", "vm", gpa=SRC, dma=EDU))
    with client.extents("region:src") as src:
        check("of-a-vm", tables() == frames(src, SRC, "rw") and len(held(keeper)) == 2, held=held(keeper))
    steps = [effect.id for effect in client.plan(do.GuestStop("vm")).effects]
    client.apply(do.GuestStop("vm"))
    check("stopped", steps[0] == "dma" and not grants(client) and held(keeper) == [], steps=steps)

    # --- the call of older kernels
    device, fd, file = vfio.open_device("/", EDU), iommufd.create(), os.memfd_create("old")
    os.ftruncate(file, SIZE)
    space = iommufd.make_space(fd)
    iommufd.bind(device, EDU, fd)
    iommufd.attach(device, space)
    iommufd.map_memory(fd, space, iommufd.Mapping(file, 0, SIZE, SRC, False))
    with ExtentTable.scan_fd(file, SIZE) as table:
        check("map-memory", tables() == frames(table, SRC, "r"), pages=table.pages)
    try:
        iommufd.map_file(fd, space, iommufd.Mapping(file, 0, PAGE, SRC, True))
        check("taken", False)
    except MemconsoleError as error:
        check("taken", error.code == "IovaTaken", error=str(error))
    check("unmapped", iommufd.unmap(fd, space, SRC, SIZE) == SIZE and iommufd.unmap(fd, space, SRC, SIZE) == 0)
    keeper.close()
    client.close()
lab.say("end")
