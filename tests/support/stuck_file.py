"""A file whose server never answers a read, so that a process that maps it holds the lock of its memory map for ever.

One process reads the file through the page cache: its page is locked until the server answers. Another has it open for
direct I/O and maps it: the kernel first waits for that page, with the lock of the memory map taken.

    request = u32 length, u32 opcode, u64 unique, u64 node, u32 uid, u32 gid, u32 pid, u32 pad, body
    reply   = u32 length, s32 error, u64 unique, body
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_IN, _OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH, _INIT = 1, 3, 14, 15, 18, 25, 26
_DIRECT_IO, _KEEP_CACHE = 1, 2
_SIZE, _FOR_EVER = 1 << 16, 1 << 20
_MNT_FORCE, _MNT_DETACH = 1, 2

MAPS = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("opened", flush=True)
sys.stdin.readline()
mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
"""


def _attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if node == 1 else stat.S_IFREG | 0o644
    return _ATTR.pack(node, 0 if node == 1 else _SIZE, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class _Server:
    """What answers, but for reads; the first who opens the file reads it through the page cache."""

    def __init__(self) -> None:
        self.device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.reading = threading.Event()
        self._opened = 0

    def run(self) -> None:
        with contextlib.suppress(OSError):  # it is unmounted
            while request := os.read(self.device, 1 << 20):
                _, opcode, unique, node, *_ = _IN.unpack_from(request)
                answer = self._answer(opcode, node)
                if answer is not None:
                    error, body = answer
                    os.write(self.device, _OUT.pack(_OUT.size + len(body), error, unique) + body)

    def _answer(self, opcode: int, node: int) -> tuple[int, bytes] | None:
        if opcode == _INIT:
            return 0, struct.pack("<IIIIHHII", 7, 31, 0, 0, 12, 9, 4096, 1).ljust(64, b"\0")
        if opcode == _LOOKUP:
            return 0, struct.pack("<4Q2I", 2, 0, _FOR_EVER, _FOR_EVER, 0, 0) + _attributes(2)
        if opcode == _GETATTR:
            return 0, struct.pack("<QII", _FOR_EVER, 0, 0) + _attributes(node)
        if opcode == _OPEN:
            self._opened += 1
            return 0, struct.pack("<QII", 1, _KEEP_CACHE | (_DIRECT_IO if self._opened > 1 else 0), 0)
        if opcode == _READ:
            self.reading.set()
            return None
        return (0, b"") if opcode in {_RELEASE, _FLUSH} else (-38, b"")


@contextlib.contextmanager
def locked_up(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that takes the lock of its memory map once it is told a line, and keeps it until the context ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    server, place = _Server(), directory / "stuck"
    place.mkdir()
    options = f"fd={server.device},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"stuck", os.fsencode(place), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    serves = threading.Thread(target=server.run)
    serves.start()
    ends = contextlib.ExitStack()
    try:
        reads = subprocess.Popen(["head", "-c1", place / "file"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ends.callback(reads.wait)
        assert server.reading.wait(300)
        command = [sys.executable, "-c", MAPS, str(place / "file")]
        maps = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ends.callback(maps.communicate)
        assert maps.stdout is not None
        assert maps.stdout.readline() == b"opened\n"
        yield maps
    finally:
        libc.umount2(os.fsencode(place), _MNT_FORCE | _MNT_DETACH)  # forced: what waits for the server is told to fail
        serves.join()
        os.close(server.device)
        ends.close()
