"""A guest's device behind an IOMMU of AMD, on a host with iommu=pt: its page tables are walked in physical memory.

QEMU's emulation logs no fault of a page that is not there: what the device does not change is the proof.
"""

from __future__ import annotations

import json
import os

from support import lab_guest as lab
from support import lab_host as host
from support.edu import BDF as EDU
from support.edu import PAGE, SIZE, Guest, bytes_of, counted, found, frames, grants, started
from support.services import services
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import iommufd
from memconsole.backend.kernel import iommu, pci
from memconsole.backend.wire.client import Client
from memconsole.extents import Flag

SRC, DST, STRAY = 0x100000, 0x8000000, 0x20000000
NOT_REMAPPED = ("device-interrupts", EDU)
"""QEMU's machine has no IOAPIC where AMD's driver wants one, so the driver remaps no interrupts."""


def tables() -> dict[int, tuple[int, str]]:
    """Every page of the device's address space by IOVA page, as memconsole walks it."""
    with iommu.table("/", pci.iommu_group("/", EDU)) as table:
        return {
            row.offset + n: (row.pfn + n, "rw" if row.flags & Flag.WRITE else "r")
            for row in table
            for n in range(row.count)
        }


def shown(client: Client) -> tuple[int | None, str]:
    """What the listing of domains says of the device's group."""
    (domain,) = (domain for domain in client.snapshot().domains if EDU in domain.devices)
    return domain.mapped, domain.why_not


with services() as service:
    client = started(service)
    unit = next((each for each in iommu.units() if EDU in each.devices), None)
    lab.say("unit", unit is not None and unit.kind == "amd-iommu", unit=str(unit))
    lab.say("not-confined", shown(client)[1].startswith("identity"), shown=shown(client))
    for region in ("src", "dst"):
        client.apply(do.Reserve(region, SIZE))
    guest = Guest(service.runtime / "agents")
    service.guests.add(guest.pid)
    client.apply(do.GuestAttach("driver", guest.pid))
    client.apply(do.Map("src", "driver", gpa=SRC, dma=EDU))
    client.apply(do.Map("dst", "driver", gpa=DST, dma=EDU))
    client.apply(do.WindowMap(f"{EDU}:0", "driver"))
    with client.extents("region:src") as src, client.extents("region:dst") as dst:
        want = frames(src, SRC, "rw") | frames(dst, DST, "rw")
    have = tables()
    lab.say("tables", have == want, have=len(have), want=len(want))
    lab.say("shown", shown(client) == (2 * SIZE, ""), shown=shown(client))
    lab.say("clean", found(client) == [NOT_REMAPPED], found=found(client))

    # --- DMA goes on while the control process dies
    for words in (("wait", "g1"), ("wait", "g2"), ("window", "g3")):
        guest.do(*words)
    guest.do("start", SRC, DST)
    with bytes_of(client, "dst") as view:
        now = guest.rounds(3)
        lab.say("dma", counted(view) >= now - 2, rounds=now, arrived=counted(view))
        client.close()
        service.end(9)
        before = counted(view)
        guest.rounds(3)
        lab.say("goes-on", counted(view) > before, before=before, after=counted(view))
        client = started(service)
        known = {id: each.dma for id, each in grants(client).items()}
        lab.say("adopted", known == {"g1": EDU, "g2": EDU}, known=known)
        lab.say("tables-after-restart", tables() == want)

    # --- what it reaches and should not
    keeper = KeeperCustody(service.runtime / "keeper")
    space, payload = keeper.get("iommu:driver")
    stray = os.memfd_create("stray")
    os.ftruncate(stray, PAGE)
    number = json.loads(payload)["space"]
    iommufd.map_file(space, number, iommufd.Mapping(stray, 0, PAGE, STRAY, True))
    lab.say("found-unknown", ("dma-unknown", EDU) in found(client), found=found(client))
    iommufd.unmap(space, number, STRAY, PAGE)
    os.close(space)
    keeper.close()
    lab.say("clean-again", found(client) == [NOT_REMAPPED], found=found(client))

    # --- revoke while DMA runs
    guest.rounds(2)
    client.apply(do.Revoke("g2"))
    with bytes_of(client, "dst") as view:
        last = bytes(view)
        now = guest.rounds(4)
        lab.say("no-byte-after", bytes(view) == last and now > counted(view) + 3, arrived=counted(view), rounds=now)
    want = {page: target for page, target in want.items() if page < DST // PAGE}
    lab.say("tables-after-revoke", tables() == want)
    guest.do("stop")
    client.apply(do.Revoke("g1"))
    guest.do("close")
    client.apply(do.WindowRevoke(f"{EDU}:0"))
    until(lambda: shown(client)[1].startswith("identity"), "nobody has the device any more", host.PATIENCE)
    lab.say("not-confined-again", shown=shown(client))
    client.close()
lab.say("end")
