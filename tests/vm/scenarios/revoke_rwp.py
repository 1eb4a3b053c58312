"""A mapping barred by UFFDIO_RWPROTECT: a canary that does not answer, on a kernel that can."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import time
from fcntl import ioctl
from pathlib import Path

import lab_guest as lab

from memconsole import actions as do
from memconsole.agent import userfaultfd
from memconsole.backend import lazy
from memconsole.backend.control import embedded
from memconsole.extents import digest_fd
from memconsole.model import GuestKind, Rung

M = 1 << 20
SIZE = 64 * M
API, REGISTER, RWPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA09


def bare() -> int:
    """Nanoseconds UFFDIO_RWPROTECT takes for 64 MiB of a populated mapping of our own, best of three."""
    fd = os.memfd_create("bare")
    os.ftruncate(fd, SIZE)
    took = []
    for _ in range(3):
        memory = mmap.mmap(fd, SIZE)
        for at in range(0, SIZE, 4096):
            memory[at] = 1
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        uffd = userfaultfd()
        ioctl(uffd, API, struct.pack("QQQ", 0xAA, 1 << 17 | 1 << 4 | 1 << 9, 0))
        ioctl(uffd, REGISTER, struct.pack("QQQQ", address, SIZE, 13, 0))
        began = time.perf_counter_ns()
        ioctl(uffd, RWPROTECT, struct.pack("QQQ", address, SIZE, 1))
        took.append(time.perf_counter_ns() - began)
        os.close(uffd)
    os.close(fd)
    return min(took)


def stands_still(pid: int) -> bool:
    """Whether the process waits in the kernel for a fault (/proc/PID/stack)."""
    time.sleep(1.0)
    return "userfault" in Path(f"/proc/{pid}/stack").read_text(encoding="ascii")


lab.say("rwp", lazy.rwp())
Path("/run/memconsole").mkdir(exist_ok=True)
control = embedded(Path("/run/memconsole/embedded"))
try:
    control.apply(do.Reserve("more", SIZE, prefault=True))
    control.apply(do.GuestStart("c1", memory=4 * M))
    control.apply(do.Map("more", "c1", gpa=1 << 30))
    (guest,) = [each for each in control.snapshot().guests if each.kind is not GuestKind.FOREIGN]
    lab.say("handed", control._desk.uffds.has("g2"), guest=guest.pid)
    # What it will not do is answer: it is stopped until its mapping is barred.
    os.kill(guest.pid, signal.SIGSTOP)
    (fd,) = control._desk.fds("more")
    kept = digest_fd(fd)
    floor = bare()
    uffds = control._desk.uffds
    began = []
    bar = uffds.bar

    def timed(grant: str) -> str:
        """The rung itself, with its time taken."""
        start = time.perf_counter_ns()
        why = bar(grant)
        began.append(time.perf_counter_ns() - start)
        return why

    uffds.bar = timed
    report = control.apply(do.Revoke("g2", within=0.5)).revoke
    lab.say("rung", report.rung is Rung.PROTECT, report=repr(report), took_ns=began[0], bare_ns=floor)
    lab.say("kept", digest_fd(fd) == kept)
    os.pwrite(fd, b"LATER-02", 0)
    mem = os.open(f"/proc/{guest.pid}/mem", os.O_RDONLY)
    shield = control._desk.shields[0]
    reader = os.fork()
    if reader == 0:
        try:
            os.pread(mem, 8, shield.start)
        except OSError:
            time.sleep(600)
        os._exit(0)
    time.sleep(1.0)
    lab.say("unread", os.waitpid(reader, os.WNOHANG) == (0, 0))
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    os.close(mem)
    snapshot = control.snapshot()
    lab.say(
        "counted-as-cut",
        not any(each.id == "mapping-unknown" for each in snapshot.findings),
        found=str(snapshot.findings),
    )
    os.kill(guest.pid, signal.SIGCONT)
    control.apply(do.GuestStop("c1"))
    lab.say(
        "let-go", not control._desk.shields and not [n for n in control._desk.custody.names() if n.startswith("uffd")]
    )
    control.apply(do.Release("more"))

    # A guest that runs into its bar waits there, and can be ended.
    control.apply(do.GuestStart("c2", memory=4 * M))
    (guest,) = [each for each in control.snapshot().guests if each.kind is not GuestKind.FOREIGN]
    lab.say("bars", control._desk.uffds.bar("g3") == "")
    lab.say("waits", stands_still(guest.pid), stack=Path(f"/proc/{guest.pid}/stack").read_text(encoding="ascii"))
    control.apply(do.GuestStop("c2"))
    lab.say("ends", not Path(f"/proc/{guest.pid}").exists())
finally:
    control.close()
lab.say("end")
