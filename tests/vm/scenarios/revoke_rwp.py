"""A mapping barred by UFFDIO_RWPROTECT: a canary that does not answer, on a kernel that can.

Every way into the barred memory is tried before and after; where somebody else has one of his own, barring the canary
is not the end; and the control process dies in the middle of the rung.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

from support import lab_guest as lab
from support.guests import mapping_of
from support.worlds import worlds

from memconsole import actions as do
from memconsole.agent import userfaultfd
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.exports import userfault
from memconsole.extents import digest_fd
from memconsole.model import Rung, Segment

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
        uffd, _ = userfaultfd()
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


def closed(read: Callable[[], bytes]) -> bool:
    """Whether a process that reads gets nothing: it waits, or is refused."""
    reader = os.fork()
    if reader == 0:
        try:
            os._exit(0 if read() else 1)
        finally:
            os._exit(1)
    time.sleep(1.0)
    ended, status = os.waitpid(reader, os.WNOHANG)
    if not ended:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    return not ended or status != 0


def by_mem(pid: int, address: int) -> bytes:
    mem = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(mem, 8, address)
    finally:
        os.close(mem)


def by_vm_read(pid: int, address: int) -> bytes:
    found, libc = ctypes.create_string_buffer(8), ctypes.CDLL(None, use_errno=True)
    here, there = struct.pack("QQ", ctypes.addressof(found), 8), struct.pack("QQ", address, 8)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    if libc.process_vm_readv(pid, here, one, there, one, none) != 8:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    return found.raw


def has_fd(pid: int, segment: Segment) -> bool:
    """Whether a process has a segment open; sockets and pipes count their inodes as memfds do, on devices of theirs."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            status = fd.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (segment.device, segment.inode):
            return True
    return False


def refused(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:
        return True
    return False


def pid_of(control: Control, name: str) -> int:
    return next(guest.pid or 0 for guest in control.snapshot().guests if guest.name == name)


def only_segment(control: Control, region: str) -> Segment:
    return next(each.segments[0] for each in control.snapshot().regions if each.name == region)


def rung(control: Control) -> None:
    """A canary that will not answer: it is stopped until its mapping is barred."""
    control.apply(do.Reserve("more", SIZE, prefault=True))
    control.apply(do.GuestStart("c1", memory=4 * M))
    control.apply(do.Map("more", "c1", gpa=1 << 30))
    pid, path = pid_of(control, "c1"), Path("/run/mnt/guests/c1/ram/more")
    lab.say("handed", control._desk.userfaults.has_uffd("g2"), guest=pid)
    os.kill(pid, signal.SIGSTOP)
    (fd,) = control._desk.fds("more")
    segment = only_segment(control, "more")
    address, _ = mapping_of(pid, segment)
    word = os.pread(fd, 8, 0)
    ways = [by_mem(pid, address), path.read_bytes()[:8]]
    try:
        ways.append(by_vm_read(pid, address))
    except OSError as error:
        assert error.errno == errno.ENOSYS, error  # noqa: PT017 - a kernel without it has a way less
    lab.say("ways-before", word != bytes(8) and set(ways) == {word}, ways=[way.hex() for way in ways])
    kept, floor = digest_fd(fd), bare()
    uffds, began, bar = control._desk.userfaults, [], control._desk.userfaults.block_access

    def timed(grant: str) -> str:
        """The rung itself, with its time taken."""
        start = time.perf_counter_ns()
        why = bar(grant)
        began.append(time.perf_counter_ns() - start)
        return why

    setattr(uffds, "block_access", timed)  # noqa: B010 - a method of this one object
    report = control.apply(do.Revoke("g2", within=0.5)).revoke
    assert report is not None
    lab.say("rung", report.rung is Rung.PROTECT, report=repr(report), took_ns=began[0], bare_ns=floor)
    lab.say("kept", digest_fd(fd) == kept)
    os.pwrite(fd, b"LATER-02", 0)
    lab.say("unread", closed(lambda: by_mem(pid, address)))
    lab.say("unread-by-vm-read", closed(lambda: by_vm_read(pid, address)))
    lab.say("no-fd", not has_fd(pid, segment))
    lab.say("no-path", refused(path))
    lab.say("not-written-by-a-trap", os.pread(fd, 8, 0) == b"LATER-02")
    found = control.snapshot().findings
    lab.say("counted-as-cut", not any(each.id == "mapping-unknown" for each in found), found=str(found))
    os.kill(pid, signal.SIGCONT)
    control.apply(do.GuestStop("c1"))
    held = [name for name in control._desk.custody.names() if name.startswith("uffd")]
    lab.say("let-go", not control._desk.blocked_mappings and not held)
    control.apply(do.Release("more"))


def waits(control: Control) -> None:
    """A guest that runs into its bar waits there, and can be ended."""
    control.apply(do.GuestStart("c2", memory=4 * M))
    pid, (grant,) = pid_of(control, "c2"), [each.id for each in control.snapshot().grants]
    lab.say("bars", control._desk.userfaults.block_access(grant) == "")
    lab.say("waits", stands_still(pid), stack=Path(f"/proc/{pid}/stack").read_text(encoding="ascii"))
    control.apply(do.GuestStop("c2"))
    lab.say("ends", not Path(f"/proc/{pid}").exists())


OTHER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 4096)
print("has it", flush=True)
sys.stdin.readline()
print(memory[0])
"""


def somebody_else(control: Control) -> None:
    """A mapping that is not the canary's: to bar the canary is not enough, and the contents move away from both."""
    control.apply(do.GuestStart("c3", memory=4 * M))
    pid, (grant,) = pid_of(control, "c3"), [each.id for each in control.snapshot().grants]
    address, length = mapping_of(pid, only_segment(control, "c3"))
    path = f"/proc/{pid}/map_files/{address:x}-{address + length:x}"
    command = [sys.executable, "-c", OTHER, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        os.kill(pid, signal.SIGSTOP)
        kept = digest_fd(control._desk.fds("c3")[0])
        report = control.apply(do.Revoke(grant, within=0.5)).revoke
        assert report is not None
        tried = (Rung.ASK, Rung.PROTECT, Rung.COPY)
        lab.say("not-enough", (report.rung, report.tried) == (Rung.COPY, tried), report=repr(report))
        lab.say("moved-whole", digest_fd(control._desk.fds("c3")[0]) == kept)
        other.communicate("look\n")
        lab.say("other-ends", other.returncode == -signal.SIGBUS, ended=other.returncode)
    os.kill(pid, signal.SIGCONT)
    control.apply(do.GuestStop("c3"))


def dies(point: str) -> None:
    """A control process that dies in the middle of the rung; the next one bars, or has barred, the same mapping."""
    with worlds() as world:
        with world.control() as control:
            control.apply(do.GuestStart("c4", memory=4 * M))
            control.apply(do.Reserve("more", 4 * M, prefault=True))
            control.apply(do.Map("more", "c4", gpa=1 << 30))
            pid, (fd,) = pid_of(control, "c4"), control._desk.fds("more")
            os.kill(pid, signal.SIGSTOP)
            (address, _), kept = mapping_of(pid, only_segment(control, "more")), digest_fd(fd)
        world.dies(do.Revoke("g2", within=0.5), point)
        with world.control() as control:
            grants = [each.id for each in control.snapshot().grants]
            said = control.events(0)[-1].text
            right = (
                grants == ["g1"]
                and control._state.unfinished == {}
                and "(more to c4) is cut after" in said
                and len(control._desk.blocked_mappings) == 1
                and digest_fd(control._desk.fds("more")[0]) == kept
                and closed(lambda: by_mem(pid, address))
            )
            lab.say(f"dies-at-{point}", right, grants=grants, said=said)
            os.kill(pid, signal.SIGCONT)
            control.apply(do.GuestStop("c4"))


lab.say("rwp", userfault.rwp())
for directory in ("/run/memconsole", "/run/mnt"):
    Path(directory).mkdir(exist_ok=True)
embedded = Control(Path("/run/memconsole/embedded"), OwnCustody(), mountpoint=Path("/run/mnt"))
try:
    rung(embedded)
    waits(embedded)
    somebody_else(embedded)
finally:
    embedded.close()
for moment in ("before", "barred", "after"):
    dies(f"revoke.protect.{moment}")
lab.say("end")
