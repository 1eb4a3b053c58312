"""QEMU's edu device in the lab, the process that drives it, and what its address space leads to.

edu (docs/specs/edu.rst of QEMU): a DMA of COUNT bytes from SRC to DST begins with a write of CMD (1 from memory to the
device's buffer at 0x40000, 3 back), and has ended when bit 0 of CMD is clear.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.kernel import vtd
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError, NoControl
from memconsole.extents import ExtentTable
from memconsole.model import Grant
from support import lab_guest as lab
from support.guests import Obedient
from support.lab_host import PATIENCE, heard
from support.services import Service
from support.waiting import LONG_S

BDF = "0000:00:04.0"
PAGE = 4096
SIZE = 1 << 20
SRC, DST = 0x100000, 0x8000000
"""Where the guest that drives the device has its grants g1 and g2."""
Pages = dict[int, tuple[int, str]]
"""Of each IOVA page the frame it leads to, and how."""

GUEST = """
import struct, sys, threading, time
from memconsole.agent import Agent

agent = Agent(sys.argv[1])
state = {"rounds": 0, "run": False}

def dma(source, target, count, command):
    bar = state["bar"]
    bar[0x80 // 8], bar[0x88 // 8], bar[0x90 // 8], bar[0x98 // 8] = source, target, count, command
    while bar[0x98 // 8] & 1:
        time.sleep(0.01)

def rounds(src, dst):
    # Each round writes its number into guest memory; the device carries it to the other grant.
    while state["run"]:
        state["rounds"] += 1
        memory = agent.grants["g1"].memory
        memory[:8] = struct.pack("<Q", state["rounds"])
        dma(src, 0x40000, 4096, 1)
        dma(0x40000, dst, 4096, 3)

for line in sys.stdin:
    words = line.split()
    said = "done"
    if words[0] == "wait":
        agent.wait(words[1], 300)
    elif words[0] == "window":
        memory = agent.wait(words[1], 300).memory
        with memory.cast("I") as registers:  # below 0x80 it knows accesses of four bytes only
            said = hex(registers[0])
        state["bar"] = memory.cast("Q")
    elif words[0] == "start":
        state["run"] = True
        thread = threading.Thread(target=rounds, args=(int(words[1]), int(words[2])))
        thread.start()
    elif words[0] == "stop":
        state["run"] = False
        thread.join()
    elif words[0] == "rounds":
        said = str(state["rounds"])
    elif words[0] == "close":
        state.pop("bar").release()
    print(said, flush=True)
agent.close()
"""


class Guest(Obedient):
    """The process that drives the device."""

    def __init__(self, agents: Path) -> None:
        super().__init__([sys.executable, "-c", GUEST, str(agents)])

    def rounds(self, more: int) -> int:
        """Its rounds once it did so many more."""
        begin = int(self.do("rounds"))
        while (now := int(self.do("rounds"))) < begin + more:
            time.sleep(0.1)
        return now


def started(service: Service, fault: str = "") -> Client:
    """A service that ends at a fault point, and a client; Python starts slowly where every instruction is emulated."""
    service.start(wait=False, env={FAULT_VARIABLE: fault})
    while True:
        try:
            return service.client()
        except NoControl:
            assert service.process is not None
            assert service.process.poll() is None


def dies(service: Service, client: Client, action: do.Action) -> bool:
    """Whether the service ends in the middle of an action."""
    try:
        client.apply(action)
    except MemconsoleError:
        assert service.process is not None
        return service.process.wait(LONG_S) == -9
    return False


def refused(client: Client, action: do.Action) -> list[str]:
    return [refusal.code for refusal in client.plan(action).refusals]


@contextlib.contextmanager
def bytes_of(client: Client, region: str) -> Iterator[mmap.mmap]:
    """A region as root reads it."""
    (fd,) = client.open_region(region)
    try:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as view:
            yield view
    finally:
        os.close(fd)


def counted(view: mmap.mmap) -> int:
    """The round that last arrived."""
    return int(struct.unpack_from("<Q", view)[0])


def grants(client: Client) -> dict[str, Grant]:
    return {grant.id: grant for grant in client.snapshot().grants}


def tables() -> Pages:
    """Every page of the device's address space (debugfs)."""
    return {run.iova + n: (run.pfn + n, run.access) for run in vtd.iovas("/", BDF) for n in range(run.pages)}


def frames(table: ExtentTable, gpa: int, access: str) -> Pages:
    """What the device's tables must say for a region that is mapped at a GPA."""
    return {gpa // PAGE + row.offset + n: (row.pfn + n, access) for row in table for n in range(row.count)}


def found(client: Client) -> list[tuple[str, str]]:
    """The findings about devices, as of now, once everybody has answered."""
    findings = heard(client).findings
    return [(each.id, each.subject) for each in findings if each.id.startswith(("dma", "device", "frame"))]


def found_at_last(client: Client, wanted: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The findings about devices, once they are those; what was found last where they never are."""
    deadline = time.monotonic() + PATIENCE
    while (told := found(client)) != wanted and time.monotonic() < deadline:
        time.sleep(1)
    return told


def revoked_while_it_runs(service: Service, client: Client, guest: Guest, want: Pages) -> Pages:
    """DMA from g1 to g2 outlives the control process; the next one revokes g2 meanwhile, and dies itself mapping anew.

    Verdicts on every step; ``want`` is what the device reaches at first, what it is to reach at last is returned.
    """
    guest.do("start", SRC, DST)
    with bytes_of(client, "dst") as view:
        now = guest.rounds(3)
        lab.say("dma", 0 < counted(view) >= now - 2, rounds=now, arrived=counted(view))
        client.close()
        service.end(9)
        before = counted(view)
        guest.rounds(3)
        lab.say("goes-on", counted(view) > before, before=before, after=counted(view))
        client = started(service, "map.dma.after")
        lab.say("adopted", [grants(client)[id].dma for id in ("g1", "g2")] == [BDF, BDF])
        lab.say("tables-after-restart", tables() == want)
        lab.say("clean-after-restart", found(client) == [], found=found(client))
        before = counted(view)
        guest.rounds(2)
        earlier = faults()
        outcome = client.apply(do.Revoke("g2"))
    # The region lies in another file now, and the guest's old one is empty.
    with bytes_of(client, "dst") as view:
        last = bytes(view)
        lab.say("revoked-in-order", [effect.id for effect in outcome.effects] == ["dma", "cut"])
        lab.say("flowed-until-then", counted(view) > before, before=before, last=counted(view))
        now = guest.rounds(4)
        lab.say("no-byte-after", bytes(view) == last and now > counted(view) + 3, arrived=counted(view), rounds=now)
        new = [line for line in faults() if line not in earlier]
        lab.say("faults", any(f"0x{DST:x}" in line for line in new), lines=new[:2])
    left = {page: target for page, target in want.items() if page < DST // PAGE}
    lab.say("tables-after-revoke", tables() == left)
    guest.do("stop")
    lab.say("died-mapping", dies(service, client, do.Map("other", "driver", gpa=DST, dma=BDF)))
    lab.say("was-mapped", len(tables()) == len(left) + SIZE // PAGE)
    return left


def held(keeper: KeeperCustody) -> list[str]:
    """What custody has of address spaces and devices."""
    return [name for name in keeper.names() if name.startswith(("iommu:", "vfio:", "group:"))]


def faults() -> list[str]:
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [line for line in said.splitlines() if "fault addr" in line]
