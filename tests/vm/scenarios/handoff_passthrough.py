"""A QEMU with a device passed through to it through a real kexec, its guest suspended to RAM meanwhile.

The guest (tests/support/firmware.S) has edu carry a counter through its memory, suspends itself after some rounds, and
counts on when it is woken. The witness of the page tables is memconsole's reader; that of DMA is the guest's memory.

handoff_passthrough FAULTS    1: somebody dies on the way, too
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path

import msgspec
from support import lab_guest as lab
from support import lab_host as host
from support.edu import BDF as EDU
from support.edu import PAGE, tables
from support.firmware import DST, HOLE, STATUS, firmware

from memconsole import actions as do
from memconsole import paths, timeline
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import vfio
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import GuestState

GUEST, PLAIN = "vm", "plain"
RAM, ROUNDS = 16 << 20, 60
NOTES = lab.SHARE / "notes.json"
FAULTS = int(sys.argv[1])
BEFORE = (f"handoff-run.save-{GUEST}.after", f"handoff-run.quiesce-{EDU}.after")
AFTER = ("handoff-back.handed", "guest-resume.again.after", "handoff-back.compared")


def counted() -> tuple[int, int, int]:
    """Rounds begun, how often it was woken, and what the device last wrote."""
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    try:
        fd, _ = keeper.get(f"region:{GUEST}:0")
    finally:
        keeper.close()
    try:
        begun, woken = struct.unpack("<I8xI", os.pread(fd, 16, STATUS))
        return begun, woken, int(struct.unpack("<I", os.pread(fd, 4, DST))[0])
    finally:
        os.close(fd)


def becomes(client: Client, state: GuestState, within: float = host.PATIENCE) -> bool:
    deadline = time.monotonic() + within
    while host.guest(host.fresh(client), GUEST).state is not state:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def ram() -> list[list[object]]:
    """Where the device's page tables lead, of the guest's RAM."""
    return [[page, *lead] for page, lead in sorted(tables().items()) if page in range(RAM // PAGE) and page not in HOLE]


def begin() -> Client:
    client = host.serve()
    host.plan(client, host.action())  # the image is unpacked once
    client.apply(do.GuestStart(PLAIN, memory=8 << 20))
    start = do.GuestStart(GUEST, vmm="qemu", memory=RAM, device=EDU, args=firmware(lab.SHARE, ROUNDS))
    client.apply(start)
    plan = host.plan(client, host.action())
    awake = next(each for each in plan.conditions if each.id == "guest-incapable")
    lab.say("awake", not awake.ok and "suspended" in awake.observed, condition=str(awake))
    lab.say("suspended", becomes(client, GuestState.SUSPENDED), counted=counted())
    lab.say("dma", counted() == (ROUNDS, 0, ROUNDS), counted=counted())
    return client


def is_as_it_was(client: Client) -> str:
    """What is not as it was before a handoff that came to nothing."""
    if why := host.all_count_on(client, (PLAIN,)):
        return why
    found = host.guest(host.fresh(client), GUEST)
    if found.state is not GuestState.SUSPENDED or counted() != (ROUNDS, 0, ROUNDS):
        return f"it is {found.state}, {counted()}"
    return f"findings: {host.findings(client)}" if host.findings(client) else ""


def faults(client: Client) -> Client:
    for point in BEFORE:
        client, died = host.killed_at(client, point)
        why = is_as_it_was(client)
        lab.say(f"killed-{point}", not why and died == "ControlDied", why=why, died=died)
    return client


def rehearse(client: Client) -> None:
    pid = host.guest(host.fresh(client), GUEST).pid
    plan = host.plan(client, do.HandoffRehearse())
    stays = next(each for each in plan.conditions if each.id == "guest-stays")
    client.apply(do.HandoffRehearse())
    why, now = is_as_it_was(client), host.guest(client.snapshot(), GUEST).pid
    lab.say("rehearsed", not why and now == pid and GUEST in stays.observed, why=why, condition=str(stays))


def jump(client: Client) -> None:
    plan = host.plan(client, host.action())
    bad = [each.id for each in plan.conditions if not each.ok and each.severity == "error"]
    lab.say("check", not plan.refusals, bad=bad, not_ok=[each.id for each in plan.conditions if not each.ok])
    NOTES.write_text(json.dumps({"ram": ram(), "counted": counted()}))
    client.apply(host.action())
    raise AssertionError("the handoff returned")


def landed() -> Client:
    notes = json.loads(NOTES.read_text())
    code = Path("/run/early.code").read_text().strip()
    lab.say("early", code == "0", code=code, err=Path("/run/early.log").read_text())
    lab.say("free", vfio.driver("/", EDU) is None)
    for point in AFTER if FAULTS else ():
        lab.say(f"killed-{point}", host.try_to_serve(point) is None)
    client = host.serve()
    lab.say("still-suspended", becomes(client, GuestState.SUSPENDED), guest=str(host.guest(client.snapshot(), GUEST)))
    lab.say("counted", list(counted()) == notes["counted"], counted=counted(), before=notes["counted"])
    now = ram()
    lab.say("tables", now == notes["ram"] and len(now) == RAM // PAGE - len(HOLE), pages=len(now))
    report = client.snapshot().handoff
    assert report is not None
    lab.say(
        "rebuilt", [(each.how, each.same) for each in report.devices] == [("rebuilt", True)], is_=str(report.devices)
    )
    lab.say("back", all(each.back for each in report.guests), shown=timeline.lines(report, 140))
    lab.say("findings", host.findings(client) == [], findings=host.findings(client))
    why = host.all_count_on(client, (PLAIN,))
    lab.say("plain", not why, why=why)
    left = [name for name in host.held() if name.startswith(("session:", "state:", "iova:", "resume"))]
    lab.say("tidy", not left, left=left)

    client.apply(do.GuestResume(GUEST))
    lab.say("woken", becomes(client, GuestState.SUSPENDED), counted=counted())
    lab.say("dma-again", counted() == (2 * ROUNDS, 1, 2 * ROUNDS), counted=counted())
    lab.say("findings-after", host.findings(client) == [], findings=host.findings(client))
    return client


def main() -> None:
    if lab.stage() == 1:
        client = begin()
        rehearse(client)
        if FAULTS:
            client = faults(client)
        jump(client)
    client = landed()
    client.apply(do.GuestStop(GUEST))
    lab.say("end", host.guest(client.snapshot(), PLAIN).state is GuestState.RUNNING)


try:
    main()
except (MemconsoleError, AssertionError, OSError) as error:
    import traceback

    log = Path("/run/memconsole/vmm/vm/log")
    lab.say(
        "exception",
        ok=False,
        text=f"{error!r}",
        trace=traceback.format_exc()[-2000:],
        log=log.read_text()[-1500:] if log.exists() else "",
        served=msgspec.to_builtins(host.held()),
    )
