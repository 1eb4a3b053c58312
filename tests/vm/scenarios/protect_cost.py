"""What the protect rung costs for a canary whose whole memory is mapped, beside UFFDIO_RWPROTECT alone.

That is of the very range, as the rung calls it, and of a mapping of our own, at which no KVM looks.

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
from types import SimpleNamespace
from unittest import mock

from support import lab_guest as lab
from support import lab_host as host
from support.guests import mapping_of
from support.timing import timed

from memconsole import actions as do
from memconsole.agent import userfaultfd
from memconsole.backend.control import Control
from memconsole.backend.exports import userfault
from memconsole.backend.revoke.ladder import Ladder
from memconsole.model import Rung, Segment

SIZE, ROUNDS = int(sys.argv[1]) << 20, int(sys.argv[2])
API, REGISTER, RWPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA09
PART = 1 << 20
PATIENCE = 200.0


def bare() -> int:
    """Nanoseconds of UFFDIO_RWPROTECT of a mapping of our own, populated as the guest's is."""
    fd = os.memfd_create("bare")
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(host.MADV_POPULATE_WRITE)
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        uffd, _ = userfaultfd()
        ioctl(uffd, API, struct.pack("QQQ", 0xAA, 1 << 17 | 1 << 4 | 1 << 9, 0))
        ioctl(uffd, REGISTER, struct.pack("QQQQ", address, SIZE, 13, 0))
        began = time.perf_counter_ns()
        ioctl(uffd, RWPROTECT, struct.pack("QQQ", address, SIZE, 1))
        took = time.perf_counter_ns() - began
        os.close(uffd)
        del view
    os.close(fd)
    return took


def fill(pid: int, segment: Segment) -> None:
    """Have all of a guest's memory in its page tables, as if it had walked it: who reads it by /proc/PID/mem puts it
    there. Without KVM of the host's own a guest would take minutes for it.
    """
    address, length = mapping_of(pid, segment)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        for _ in range(0, length, PART):
            assert len(memory.read(PART)) == PART
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    assert next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) << 10 >= length


def state_of(pid: int) -> str:
    """The state of a process; X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def end(pid: int) -> None:
    """Kill a guest; its memory is given back before it has ended, which takes its time."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while state_of(pid) not in {"Z", "X"}:
        assert time.monotonic() < deadline, f"the guest {pid} does not end"
        time.sleep(0.1)


def timed_ioctl(took: list[int]) -> Callable[[], None]:
    """Have the rung's own UFFDIO_RWPROTECT leave its nanoseconds; what is returned puts the call back."""

    def call(fd: int, request: int, argument: bytes) -> bytes:
        began = time.perf_counter_ns()
        done = ioctl(fd, request, argument)
        if request == RWPROTECT:
            took.append(time.perf_counter_ns() - began)
        return done

    patch = mock.patch.object(userfault, "fcntl", SimpleNamespace(ioctl=call))
    patch.start()
    return patch.stop


def protected(control: Control) -> tuple[int, int, int]:
    """Nanoseconds of the ioctl, of the bar, and of the whole rung, for a canary that does not answer."""
    control.apply(do.GuestStart("c", memory=SIZE))
    (guest,) = (each for each in control.snapshot().guests if each.name == "c")
    (grant,) = (each for each in control.snapshot().grants if each.guest == "c")
    (region,) = (each for each in control.snapshot().regions if each.name == "c")
    os.kill(guest.pid or 0, signal.SIGSTOP)
    fill(guest.pid or 0, region.segments[0])
    calls: list[int] = []
    bars: list[int] = []
    rungs: list[int] = []
    back = (timed_ioctl(calls), timed(control._desk.userfaults, "block_access", bars), timed(Ladder, "_protect", rungs))
    report = control.apply(do.Revoke(grant.id, within=0.5)).revoke
    for put in back:
        put()
    assert report is not None
    assert report.rung is Rung.PROTECT, report
    end(guest.pid or 0)
    control.apply(do.GuestStop("c"))
    control.apply(do.Release("c"))
    return calls[0], bars[0], rungs[0]


def main() -> None:
    with host.embedded() as control:
        for page in host.page_sizes():
            floors, ours = [], []
            for _ in range(ROUNDS):
                floors.append(bare())
                ours.append(protected(control))
            calls, bars, rungs = zip(*ours, strict=True)
            lab.say("protect", page=page, own_ns=floors, call_ns=calls, bar_ns=bars, rung_ns=rungs)
    lab.say("end")


main()
