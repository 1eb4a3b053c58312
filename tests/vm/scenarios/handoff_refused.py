"""Every condition that can be brought about here, brought about, and refused by its name; the host it was is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import lab_guest as lab
from msgspec.structs import replace

from memconsole import paths
from memconsole.actions import GuestStart, HandoffRun, Release, Reserve
from memconsole.backend.handoff import luo
from memconsole.backend.handoff.check import code
from memconsole.backend.wire.client import Client
from memconsole.model import Plan

TOOL = str(Path(sys.executable).parent / "memconsole")
MIB = 1 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
DISABLED = Path("/proc/sys/kernel/kexec_load_disabled")


def without_abi() -> str:
    """The lab's kernel, uncompressed and without its KHO word."""
    data = bytearray((lab.SHARE / "bzImage").read_bytes())
    start = (data[0x1F1] + 1) * 512 + int.from_bytes(data[0x248:0x24C], "little")
    length = int.from_bytes(data[0x24C:0x250], "little")
    data[start : start + length] = (b"\x7fELF" + b"luo-v5\0memfd-v2\0kho-v3\0").ljust(length, b"\0")
    path = Path("/tmp/bzImage.other")
    path.write_bytes(data)
    return str(path)


def main() -> None:
    limit = Path("/sys/fs/cgroup/small")
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+memory")
    limit.mkdir()
    done = subprocess.run(
        [TOOL, "serve", "--state-dir", "/run/state"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (limit / "cgroup.procs").write_text(str(os.getpid())) and None,
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    client = Client(paths.control_socket())
    client.apply(GuestStart("c0", memory=8 * MIB))
    share = str(lab.SHARE)
    fine = HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())

    def plan(action: HandoffRun = fine) -> Plan:
        return client.plan(action)

    def refused(id: str, act: Callable[[], Plan]) -> None:
        codes = [each.code for each in act().refusals]
        lab.say(f"refused-{id}", codes == [code(id)], codes=codes)

    lab.say("clean", not plan().refusals, refusals=str(plan().refusals))
    line = fine.append
    refused("command-line-kho", lambda: plan(replace(fine, append=line.replace("kho=on", ""))))
    refused("command-line-liveupdate", lambda: plan(replace(fine, append=line.replace("liveupdate=on", ""))))
    refused("command-line-memmap", lambda: plan(replace(fine, append=line.replace("memmap=16M!1G", ""))))
    refused("image-kho-abi", lambda: plan(replace(fine, kernel=without_abi())))
    refused("image-unreadable", lambda: plan(replace(fine, initrd="/nowhere")))
    vast = Path("/tmp/vast")
    with vast.open("wb") as file:
        file.truncate(1 << 30)
    refused("image-too-large", lambda: plan(replace(fine, initrd=str(vast))))
    POOL.write_text("4")
    client.apply(Reserve("huge", 2 * MIB, page_size=2 * MIB))
    refused("hugetlb", plan)
    client.apply(Release("huge"))
    (limit / "memory.max").write_text("max")
    client.apply(Reserve("big", 512 * MIB))
    (limit / "memory.max").write_text(str(400 * MIB))
    refused("memory-max", plan)
    (limit / "memory.max").write_text("max")
    client.apply(Release("big"))
    device = os.open(luo.DEVICE, os.O_RDWR)
    refused("device-taken", plan)
    os.close(device)
    pid = next(each.pid for each in client.snapshot().guests if each.name == "c0")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    refused("guest-silent", plan)
    os.kill(pid, signal.SIGCONT)
    lab.say("clean-again", not plan().refusals, refusals=str(plan().refusals))
    DISABLED.write_text("1")
    refused("kexec-disabled", plan)
    lab.say("end")


try:
    main()
except Exception as error:  # noqa: BLE001 - whatever it is, the host is told
    lab.say("exception", ok=False, text=f"{error}", trace=traceback.format_exc()[-3000:])
