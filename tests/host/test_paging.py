"""How guests of this host map their memory, and what their VMMs say of themselves: shown as the kernel has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import controls, guest, region
from support.guests import HUGE, collapse, read
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.guests.commandline import BINARY
from memconsole.model import Finding, Guest, GuestSeen

M = 1 << 20
RAM = 96 * M

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads other processes' memory: root")


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


def found(control: Control) -> list[Finding]:
    return [each for each in control.snapshot().findings if each.id == "guest-base-pages"]


def seen(control: Control, name: str) -> GuestSeen:
    found = guest(control.snapshot(), name).seen
    assert found is not None
    return found


def shown(control: Control, name: str) -> Guest:
    """The guest, once it was looked at how its memory is mapped."""
    until(lambda: seen(control, name).huge is not None, "a look")
    return guest(control.snapshot(), name)


@pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")
def test_a_qemu_shows_its_vcpus_and_its_huge_pages(control: Control) -> None:
    control.apply(do.Reserve("spare", RAM))
    control.apply(do.GuestStart("vm", vmm="qemu", memory=RAM, args=("-accel", "tcg", "-smp", "3", "-S")))
    with control._desk.borrowed_fds("vm") as (fd,):
        collapse(fd, RAM)
    vm, pid = seen(control, "vm"), guest(control.snapshot(), "vm").pid
    assert pid is not None
    assert vm.vcpus is not None
    tasks = {int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}
    assert [vcpu.index for vcpu in vm.vcpus] == [0, 1, 2]
    assert len({vcpu.tid for vcpu in vm.vcpus} & tasks) == 3
    (block,) = vm.ram
    assert block.start % HUGE == 0
    read(pid, block.start, RAM)
    until(lambda: seen(control, "vm").huge == RAM, "the next look")
    assert found(control) == []


MISPLACED = """
import ctypes, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(fd).st_size
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
room = libc.mmap(None, size + (4 << 20), 0, 0x22, -1, 0)
at = libc.mmap(-(-room // (2 << 20)) * (2 << 20) + 4096, size, 3, 0x11, fd, 0)
ctypes.memset(at, 1, size)
print("mapped", flush=True)
sys.stdin.read()
"""


def test_a_guest_that_maps_where_huge_pages_cannot_be_is_a_finding(control: Control) -> None:
    control.apply(do.Reserve("data", RAM))
    with control._desk.borrowed_fds("data") as (fd,):
        collapse(fd, RAM)
        inode = os.fstat(fd).st_ino
        path = f"/proc/{os.getpid()}/fd/{fd}"
        command = [sys.executable, "-c", MISPLACED, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"mapped\n"
            control.apply(do.GuestAttach("db", process.pid))
            control.apply(do.Map("data", "db"))
            assert region(control.snapshot(), "data").segments[0].inode == inode
            db = shown(control, "db")
            assert db.seen is not None
            assert (db.seen.huge, db.seen.ram[0].mapped) == (0, RAM)
            (finding,) = found(control)
            assert finding.subject == "db"
            assert "no multiple of 2 MiB" in finding.observed
            plan = control.plan(do.HandoffRehearse())
            (condition,) = [each for each in plan.conditions if each.id == "guest-base-pages"]
            assert not condition.ok
            assert condition.observed == "db maps data at another address"
            process.stdin.close()
