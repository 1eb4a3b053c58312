"""A guest's device through a real kexec: real DMA before and after, the same IOVAs, the window, and whoever dies there.

Who drives the device is this scenario, through the BAR that sysfs shows: the canary's vCPU has no driver. The witness
of the page tables is the text of debugfs itself, each leaf's IOVA and last entry, read by nothing of memconsole.

handoff_devices FAULTS [differs]    so many faults (1 to 4) on each side of the jump; a second jump, after which
                                    frames are others
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from support import lab_guest as lab
from support import lab_host as host
from support.faultpoints import fault_points

from memconsole import actions as do
from memconsole import paths, timeline
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.dma import vfio
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import GuestState

EDU = "0000:00:04.0"
GUEST, PLAIN = "vm", "plain"
MIB = 1 << 20
SIZE = 8 * MIB
GPA = 0x10000000
PAGE = 4096
NOTES = lab.SHARE / "notes.json"
PATTERN = bytes(range(256)) * 8
FAULTS = int(sys.argv[1])
AFTER = ("handoff-back.bound", "handoff-back.attached", "handoff-back.compared", "handoff-back.mapped")


def witness() -> list[tuple[str, str]]:
    """IOVA page and last entry of each leaf, as the kernel's text has them."""
    text = Path(f"/sys/kernel/debug/iommu/intel/{EDU}/domain_translation_struct").read_text()
    rows = re.findall(r"^(0x[0-9a-f]+) \|((?:\t0x[0-9a-f]{16})+)$", text, re.MULTILINE)
    return [(iova, [entry for entry in entries.split() if int(entry, 16)][-1]) for iova, entries in rows]


class Edu:
    """The device, driven through its BAR."""

    def __init__(self) -> None:
        with Path(f"/sys/bus/pci/devices/{EDU}/resource0").open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 1 << 20)
        self._words = memoryview(self._map).cast("Q")

    def move(self, source: int, target: int, command: int) -> None:
        for register, value in ((0x80, source), (0x88, target), (0x90, len(PATTERN)), (0x98, command)):
            self._words[register // 8] = value
        deadline = time.monotonic() + host.PATIENCE
        while self._words[0x98 // 8] & 1:
            assert time.monotonic() < deadline, "the DMA does not end"

    def close(self) -> None:
        self._words.release()
        self._map.close()


def carried(offset: int, pattern: bytes) -> bool:
    """Whether the device carries bytes of the grant to another place of it: from memory, and back into memory."""
    edu, keeper = Edu(), KeeperCustody(paths.runtime_dir() / "keeper")
    fd, _ = keeper.get("region:ring:0")
    try:
        with mmap.mmap(fd, SIZE) as view:
            view[offset : offset + len(pattern)] = pattern
            edu.move(GPA + offset, 0x40000, 1)
            edu.move(0x40000, GPA + offset + PAGE, 3)
            return view[offset + PAGE : offset + PAGE + len(pattern)] == pattern
    finally:
        os.close(fd)
        keeper.close()
        edu.close()


def masters() -> bool:
    """Whether the device has the bus, as its configuration space says."""
    return bool(Path(f"/sys/bus/pci/devices/{EDU}/config").read_bytes()[4] & 4)


def left() -> list[str]:
    return [name for name in host.held() if name.startswith(("session:", "state:", "iova:", "manifest"))]


def has_window(client: Client) -> bool:
    snapshot = host.fresh(client)
    found = next(each for each in snapshot.windows if each.id == f"{EDU}:0")
    return found.guest == GUEST and host.guest(snapshot, GUEST).pid in found.holders


def begin() -> Client:
    client = host.serve()
    client.apply(do.GuestStart(PLAIN, memory=SIZE))
    client.apply(do.GuestStart(GUEST, memory=SIZE))
    client.apply(do.Reserve("ring", SIZE))
    client.apply(do.Map("ring", GUEST, gpa=GPA, dma=EDU))
    client.apply(do.WindowMap(f"{EDU}:0", GUEST))
    lab.say("window", has_window(client))
    # The canary stamps what it may write: the pattern lies in the same page as no stamp, behind its 32 bytes.
    lab.say("dma", carried(5 * PAGE + 64, PATTERN))
    return client


def as_before(client: Client, was: list[tuple[str, str]]) -> str:
    """What is not as before; empty if guests go on, the device has the bus, and its tables are the same."""
    if why := host.all_count_on(client, (GUEST, PLAIN)):
        return why
    if not masters() or witness() != was:
        return f"the device: bus {masters()}, same tables {witness() == was}"
    if not carried(9 * PAGE + 64, PATTERN[::-1]):
        return "DMA does not arrive"
    return "" if has_window(client) else "the window is gone"


def faults(client: Client, was: list[tuple[str, str]], count: int) -> Client:
    """kill -9 at so many of the steps' points: everybody goes on as before."""
    points = [
        each for each in fault_points(host.plan(client, host.action())) if ".iova-" in each or ".quiesce-" in each
    ]
    lab.say("points", len(points) == 4, points=points)
    for row in range(count):
        point = points[row * len(points) // count]
        client, died = host.killed_at(client, point)
        why = as_before(client, was)
        lab.say(f"killed-{point}", not why and not left() and died == "ControlDied", why=why, left=left(), died=died)
    return client


def rehearse(client: Client, was: list[tuple[str, str]]) -> None:
    client.apply(do.HandoffRehearse())
    report = client.snapshot().handoff
    assert report is not None
    why = as_before(client, was)
    lab.say("rehearsed", not why, why=why, report=msgspec.to_builtins(report))
    lab.say(
        "kept",
        [(each.how, each.same) for each in report.devices] == [("kept", True)] and not host.findings(client),
        findings=host.findings(client),
    )


def jump(client: Client, was: list[tuple[str, str]]) -> None:
    plan = host.plan(client, host.action())
    bad = [each.id for each in plan.conditions if not each.ok and each.severity == "error"]
    lab.say("check", not plan.refusals, bad=bad, not_ok=[each.id for each in plan.conditions if not each.ok])
    NOTES.write_text(json.dumps({"was": was, "beats": {}}))
    client.apply(host.action())
    raise AssertionError("the handoff returned")


def landed() -> Client:
    notes = json.loads(NOTES.read_text())
    was = [tuple(row) for row in notes["was"]]
    code = Path("/run/early.code").read_text().strip()
    lab.say("early", code == "0", code=code, err=Path("/run/early.log").read_text())
    lab.say("quiet", vfio.driver("/", EDU) is None and not masters())
    for point in AFTER[-FAULTS:]:
        lab.say(f"killed-{point}", host.try_to_serve(point) is None)
    client = host.serve()
    why = as_before(client, was)
    lab.say("as-before", not why, why=why, leaves=len(was))
    lab.say("tables", witness() == was and len(was) > 0)
    report = client.snapshot().handoff
    assert report is not None
    (device,) = report.devices
    lab.say("rebuilt", device.how == "rebuilt" and device.same is True and "ENOENT" in device.why, device=str(device))
    lab.say("timed", device.quiesced_ns is not None and device.back_ns is not None)
    lab.say("window-again", [each.back for each in report.windows] == [True], windows=str(report.windows))
    lab.say("back", all(each.back for each in report.guests), shown=timeline.lines(report, 140))
    blackouts = {each.name: (each.blackout_ns or 0) / 1e9 for each in report.guests}
    lab.say("blackouts", 0 < blackouts[PLAIN] < blackouts[GUEST], **blackouts)
    said = subprocess.run([host.TOOL, "handoff", "report"], capture_output=True, text=True, check=False)
    lab.say("report", said.returncode == 0 and EDU in said.stdout, text=said.stdout, err=said.stderr)
    lab.say("findings", host.findings(client) == [], findings=host.findings(client))
    lab.say("settled", not [name for name in left() if name != "manifest"], held=host.held())
    return client


def tamper() -> None:
    """Have pages of the region lie in other frames, with the bytes they had, before anybody has compared them."""
    lib = ctypes.CDLL(None, use_errno=True)
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    fd, _ = keeper.get("region:ring:0")
    at, size = 32 * PAGE, 4 * PAGE
    bytes_ = os.pread(fd, size, at)
    punched = lib.fallocate(fd, 3, ctypes.c_long(at), ctypes.c_long(size))
    taken = os.memfd_create("whoever has the frames now")
    os.write(taken, bytes(64 * PAGE))
    os.pwrite(fd, bytes_, at)
    lab.say("tampered", punched == 0 and len(bytes_) == size)
    os.close(taken)
    os.close(fd)
    keeper.close()


def differs() -> None:
    """An IOVA that leads to another frame: the guest is held, and says why, until its grant was mapped anew."""
    tamper()
    client = host.serve()
    snapshot = client.snapshot()
    report = snapshot.handoff
    assert report is not None
    found = [each[0] for each in host.findings(client)]
    lab.say("found", "handoff-iova" in found and "handoff-device" not in found, found=host.findings(client))
    lab.say("differs", [each.same for each in report.devices] == [False], devices=str(report.devices))
    state = host.guest(snapshot, GUEST).state
    lab.say("held", state is GuestState.PAUSED and not masters(), state=state, bus=masters())
    back = {each.name: each.back for each in report.guests}
    lab.say("plain-goes-on", not host.all_count_on(client, (PLAIN,)) and back == {PLAIN: True, GUEST: False}, back=back)
    refused = [each.code for each in host.plan(client, host.action()).refusals]
    lab.say("no-handoff-meanwhile", refused == ["DeviceLost"], refused=refused)
    try:
        client.apply(do.GuestResume(GUEST))
        lab.say("stays-held", ok=False)
    except MemconsoleError as error:
        lab.say("stays-held", "IOVA" in str(error), error=str(error))
    grant = next(each.id for each in snapshot.grants if each.dma)
    client.apply(do.Revoke(grant))
    client.apply(do.Map("ring", GUEST, gpa=GPA, dma=EDU))
    client.apply(do.GuestResume(GUEST))
    why = as_before(client, witness())
    lab.say("mapped-anew", not why, why=why)


def main() -> None:
    if lab.stage() == 1:
        client = begin()
        was = witness()
        rehearse(client, was)
        client = faults(client, was, FAULTS)
        jump(client, was)
    elif lab.stage() == 2:
        client = landed()
        if "differs" in sys.argv:
            jump(client, witness())
    else:
        differs()
    lab.say("end")


main()
