"""QEMU with a device of ours: its guest drives edu, custody has the device, and takes it back while DMA runs."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import time
from collections.abc import Iterable

from support import lab_guest as lab
from support.edu import BDF as EDU
from support.edu import PAGE, dies, faults, found, found_at_last, frames, grants, held, refused, started, tables
from support.firmware import DST, HOLE, SRC, STATUS, firmware
from support.services import Service, services

from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import iommufd, vfio
from memconsole.backend.wire.client import Client

RAM = 16 << 20


def check(name: str, ok: bool, **more: object) -> None:
    lab.say(name, ok, **more)


class Ram:
    """A guest's RAM as root reads it, through one file whatever becomes of the region."""

    def __init__(self, client: Client, region: str) -> None:
        (fd,) = client.open_region(region)
        self._view = mmap.mmap(fd, RAM, prot=mmap.PROT_READ)
        os.close(fd)

    def counters(self) -> tuple[int, int, int]:
        """Rounds begun, what came back from the device in the last one, the device's identification."""
        begun, back, id = struct.unpack_from("<III", self._view, STATUS)
        return begun, back, id

    def arrived(self) -> int:
        """What the device last wrote."""
        return int(struct.unpack_from("<I", self._view, DST)[0])

    def page(self) -> bytes:
        return self._view[DST : DST + PAGE]

    def rounds(self, more: int, within: float = 900) -> int:
        """Its rounds once it did so many more, or time is up."""
        begin, deadline = self.counters()[0], time.monotonic() + within
        while (now := self.counters()[0]) < begin + more and time.monotonic() < deadline:
            time.sleep(0.1)
        return now

    def close(self) -> None:
        self._view.close()


def outside(pages: Iterable[int]) -> list[int]:
    return [page for page in pages if page in range(RAM // PAGE) and page not in HOLE]


def run(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(service.command(*words), capture_output=True, text=True, check=False)


with services() as service:
    client = started(service)
    args = firmware(service.directory)
    start = do.GuestStart("vm", vmm="qemu", memory=RAM, device=EDU, args=args)

    # --- what is refused, each by its name
    check("canary", refused(client, do.GuestStart("c", device=EDU)) == ["NoDevices"])
    codes = refused(client, do.GuestStart("c", vmm="qemu", device="0000:00:1e.7"))
    check("no-device", codes == ["NoSuchDevice"], codes=codes)
    used = next(device.bdf for device in client.snapshot().devices if device.driver == "virtio-pci")
    codes = refused(client, do.GuestStart("c", vmm="qemu", device=used))
    check("in-use", codes == ["DeviceInUse"], codes=codes, bdf=used)
    keeper = KeeperCustody(service.runtime / "keeper")

    # --- a QEMU that does not start leaves nothing, and the device is as it was
    wrong = do.GuestStart("vm", vmm="qemu", memory=RAM, device=EDU, args=("-bios", "/nowhere"))
    try:
        client.apply(wrong)
        check("wrong", False)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked at
        check("wrong", held(keeper) == [] and vfio.driver("/", EDU) is None, error=str(error), held=held(keeper))

    # --- start, as a user would
    steps = [effect.id for effect in client.plan(start).effects]
    check("steps", steps[-3:] == ["bind", "hand", "spawn"], steps=steps)
    words = ("guest", "start", "vm", "--vmm", "qemu", "--memory", "16M", "--device", EDU, "--", *args)
    done = run(service, *words)
    check("cli", done.returncode == 0, out=done.stdout, err=done.stderr)
    guest = next(guest for guest in client.snapshot().guests if guest.name == "vm")
    assert guest.pid is not None
    service.guests.add(guest.pid)
    check("custody", held(keeper) == ["iommu:vm", f"vfio:{EDU}"], held=held(keeper))
    (grant,) = grants(client)
    check("grant", grants(client)[grant].dma == EDU)

    # --- real DMA, from inside the guest, into the region
    ram = Ram(client, "vm")
    now = ram.rounds(4)
    begun, back, id = ram.counters()
    check("dma", id == 0x10000ED and ram.arrived() > 0 and back >= now - 2, begun=begun, back=back, id=hex(id))
    with client.extents("region:vm") as table:
        want = frames(table, 0, "rw")
    have = tables()
    same = [page for page in outside(want) if have.get(page) == want[page]]
    check("tables", len(same) == len(outside(range(RAM // PAGE))), same=len(same), have=len(have))
    check("clean", found(client) == [], found=found(client))
    window = next(window for window in client.snapshot().windows if window.id == f"{EDU}:0")
    check("window", guest.pid in window.holders, holders=window.holders)

    # --- nobody else gets the device, nor its window
    client.apply(do.Reserve("other", PAGE))
    client.apply(do.GuestAttach("second", os.getpid()))
    codes = refused(client, do.Map("other", "second", gpa=0, dma=EDU))
    check("device-twice", codes == ["DeviceInUse"], codes=codes)
    codes = refused(client, do.WindowMap(f"{EDU}:0", "second"))
    check("window-twice", codes == ["DeviceInUse"], codes=codes)

    # --- the control process dies: DMA goes on, and the next one takes over
    client.close()
    service.end(9)
    before = ram.arrived()
    ram.rounds(3)
    check("goes-on", ram.arrived() > before, before=before, after=ram.arrived())
    client = started(service, "revoke.dma.after")
    check("adopted", grants(client)[grant].dma == EDU and found(client) == [], found=found(client))
    have = tables()
    check("tables-after-restart", all(have.get(page) == want[page] for page in outside(want)))

    # --- what it reaches beside its RAM and its firmware is found
    space, _ = keeper.get("iommu:vm")
    stray = os.memfd_create("stray")
    os.ftruncate(stray, PAGE)
    (number,) = iommufd.spaces(space)
    iommufd.map_file(space, number, iommufd.Mapping(stray, 0, PAGE, 0x20000000, True))
    told = found_at_last(client, [("dma-unknown", EDU)])  # a look at the page tables may be under way
    check("found-unknown", told == [("dma-unknown", EDU)], found=told)
    iommufd.unmap(space, number, 0x20000000, PAGE)

    # --- revoke while DMA runs, and die when the device is cut off and the processor is not: the guest goes on without
    ram.rounds(2)
    earlier = faults()
    check("died-revoking", dies(service, client, do.Revoke(grant)))
    last, arrived = ram.page(), ram.arrived()
    now = ram.rounds(4)
    check("no-byte-after", ram.page() == last and now > arrived + 3, arrived=arrived, rounds=now)
    new = [line for line in faults() if line not in earlier]
    check("faults", any(f"0x{SRC:x}" in line or f"0x{DST:x}" in line for line in new), lines=new[:2])
    try:
        check("tables-empty", tables() == {}, left=len(tables()))
    except Exception as error:  # noqa: BLE001 - the kernel shows no table for a device that has none
        check("tables-empty", True, error=str(error))
    mapped = [number for number in iommufd.spaces(space) if iommufd.unmap(space, number, 0, RAM)]
    check("unpinned", not mapped, mapped=mapped)
    os.close(space)

    # --- carried through by the next: now the processor too, and the contents stay
    client = started(service)
    check("carried-through", not grants(client), known=list(grants(client)))
    again = Ram(client, "vm")
    check("contents", again.page() == last)
    check("settled", found(client) == [], found=found(client))
    outcome = client.apply(do.GuestStop("vm"))
    check("closed", held(keeper) == [], held=keeper.names(), steps=[effect.id for effect in outcome.effects])
    for view in (ram, again):
        view.close()
    client.apply(do.Release("vm"))

    # --- another QEMU has the device, and is stopped with it
    client.apply(start)
    ram = Ram(client, "vm")
    ram.rounds(3)
    check("again", ram.arrived() > 0, arrived=ram.arrived())
    steps = [effect.id for effect in client.plan(do.GuestStop("vm")).effects]
    client.apply(do.GuestStop("vm"))
    last = ram.page()
    time.sleep(1)
    check("stopped", steps[0] == "dma" and held(keeper) == [] and ram.page() == last, steps=steps)
    ram.close()
    keeper.close()
    client.close()
lab.say("end")
