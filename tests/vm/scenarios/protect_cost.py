"""What the protect rung costs for a canary whose whole memory is mapped, beside UFFDIO_RWPROTECT alone.

protect_cost MB ROUNDS
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

import lab_guest as lab

from memconsole import actions as do
from memconsole.agent import userfaultfd
from memconsole.backend.control import Control, embedded
from memconsole.backend.revoke.ladder import Ladder
from memconsole.model import Rung

SIZE, ROUNDS = int(sys.argv[1]) << 20, int(sys.argv[2])
SHMEM_THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
MADV_POPULATE_WRITE = 23
API, REGISTER, RWPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA09
PATIENCE = 200.0


def bare() -> int:
    """Nanoseconds of UFFDIO_RWPROTECT of a mapping of our own, populated as the guest's is."""
    fd = os.memfd_create("bare")
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(MADV_POPULATE_WRITE)
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        uffd = userfaultfd()
        ioctl(uffd, API, struct.pack("QQQ", 0xAA, 1 << 17 | 1 << 4 | 1 << 9, 0))
        ioctl(uffd, REGISTER, struct.pack("QQQQ", address, SIZE, 13, 0))
        began = time.perf_counter_ns()
        ioctl(uffd, RWPROTECT, struct.pack("QQQ", address, SIZE, 1))
        took = time.perf_counter_ns() - began
        os.close(uffd)
        del view
    os.close(fd)
    return took


def timed(owner: object, name: str, took: list[int]) -> Callable[[], None]:
    """Have each call of a method leave its nanoseconds; what is returned puts the method back."""
    was = getattr(owner, name)

    def call(*arguments: object) -> object:
        began = time.perf_counter_ns()
        try:
            return was(*arguments)
        finally:
            took.append(time.perf_counter_ns() - began)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, was)


def walked(pid: int) -> None:
    """Wait until a guest has all of its memory mapped (/proc/PID/smaps_rollup:Rss)."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        if next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) << 10 >= SIZE:
            return
        time.sleep(0.2)
    raise AssertionError(f"the guest {pid} has not walked its memory")


def protected(control: Control) -> tuple[int, int]:
    """Nanoseconds of the bar, and of the whole rung, for a canary that does not answer."""
    control.apply(do.GuestStart("c", memory=SIZE))
    (guest,) = (each for each in control.snapshot().guests if each.name == "c")
    (grant,) = (each for each in control.snapshot().grants if each.guest == "c")
    walked(guest.pid or 0)
    os.kill(guest.pid or 0, signal.SIGSTOP)
    bars: list[int] = []
    rungs: list[int] = []
    back = (timed(control._desk.uffds, "bar", bars), timed(Ladder, "_protect", rungs))
    report = control.apply(do.Revoke(grant.id, within=0.5)).revoke
    for put in back:
        put()
    assert report is not None
    assert report.rung is Rung.PROTECT, report
    os.kill(guest.pid or 0, signal.SIGCONT)
    control.apply(do.GuestStop("c"))
    control.apply(do.Release("c"))
    return bars[0], rungs[0]


def main() -> None:
    Path("/run/memconsole").mkdir(exist_ok=True)
    control = embedded(Path("/run/memconsole/embedded"))
    try:
        for page, setting in (("4K", "never"), ("2M", "advise")):
            SHMEM_THP.write_text(setting)
            floors, ours = [], []
            for _ in range(ROUNDS):
                floors.append(bare())
                ours.append(protected(control))
            lab.say(
                "protect", page=page, bare_ns=floors, bar_ns=[bar for bar, _ in ours], rung_ns=[row for _, row in ours]
            )
    finally:
        control.close()
    lab.say("end")


try:
    main()
except Exception as error:  # noqa: BLE001 - whatever it is, the host is told
    lab.say("exception", ok=False, text=repr(error))
