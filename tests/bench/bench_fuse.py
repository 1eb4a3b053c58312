"""Guest memory as files against the memfd itself, and `pfnmap` against the scan it is made of."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from harness import Result, floors, holder, span, timed

from memconsole.backend.exports.fuse import FuseTree, MapPart
from memconsole.extents import Extent, ExtentTable
from memconsole.units import format_size

ROUNDS = 7
READ = 1 << 20


@contextlib.contextmanager
def mounted() -> Iterator[FuseTree | None]:
    """A mount of our own; None, and a word why, where the kernel shows no RAM as files."""
    with tempfile.TemporaryDirectory(prefix="mcf-") as directory:
        point = Path(directory) / "mnt"
        point.mkdir()
        tree = FuseTree.start(Path(directory), point)
        try:
            if tree.status().passthrough:
                print(f"bench_fuse: {tree.status().capability().why}")
                yield None
            else:
                for name in ("guests", "guests/bench", "guests/bench/ram"):
                    tree.directory(name)
                yield tree
        finally:
            tree.close()
            subprocess.run(["umount", "--lazy", point], check=True)


@contextlib.contextmanager
def memfd(size: int) -> Iterator[int]:
    fd = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def shown(tree: FuseTree, fd: int) -> Iterator[int]:
    """The file of a memfd, open."""
    path = tree.add_ram("bench", "ram", fd)
    file = os.open(path, os.O_RDWR)
    try:
        yield file
    finally:
        os.close(file)
        tree.remove("guests/bench/ram/ram")


def differing(tree: FuseTree, size: int) -> int:
    """How many pages of a mapping of the file are in other frames than the memfd's."""
    with memfd(size) as fd, shown(tree, fd) as file, mmap.mmap(file, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        anchor = ctypes.c_char.from_buffer(memory)
        with (
            ExtentTable.scan_fd(fd, size) as own,
            ExtentTable.scan(os.getpid(), ctypes.addressof(anchor), size) as theirs,
        ):
            wanted = [(row.offset, row.pfn, row.count) for row in pages(own)]
            found = [(row.offset, row.pfn, row.count) for row in pages(theirs)]
        del anchor
    return sum(a != b for a, b in zip(wanted, found, strict=True))


def pages(table: ExtentTable) -> Iterator[Extent]:
    """The rows of a table cut into pages: flags that differ cut runs elsewhere."""
    for row in table.rows(0, len(table)):
        for page in range(row.count):
            yield row._replace(offset=row.offset + page, pfn=row.pfn + page, count=1)


def bench_first_touch() -> list[Result]:
    """Every page of fresh memory, written to for the first time through the file, against through the memfd."""
    size, library, plain, through = span("512M"), floors(), [], []
    library.floor_touch.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.floor_touch.restype = ctypes.c_uint64
    with mounted() as tree:
        if tree is None:
            return []
        for _ in range(ROUNDS):
            with memfd(size) as fd:
                plain.append(library.floor_touch(fd, size))
            with memfd(size) as fd, shown(tree, fd) as file:
                through.append(library.floor_touch(file, size))
        other = differing(tree, min(size, 64 << 20))
    count = size / mmap.PAGESIZE * 1e3
    return [
        Result("first touch of a page through the mount", min(through) / count, "us", min(plain) / count, 1.05),
        Result("pages in other frames than the memfd's", other, "pages", None, 0),
    ]


def read_whole(path: Path) -> None:
    """Open a file and read it to its end."""
    fd = os.open(path, os.O_RDONLY)
    try:
        while os.read(fd, READ):
            pass
    finally:
        os.close(fd)


def bench_pfnmap() -> list[Result]:
    """`pfnmap` of a guest, opened and read, against the scan of its memory in this process; in turns."""
    size = span("4G")
    results: list[Result] = []
    for shape, stride in (("touched", 1), ("scattered", 7)):
        with mounted() as tree, holder(size, stride) as (pid, _):
            if tree is None:
                return results
            fds = Path(f"/proc/{pid}/fd")
            link = next(link for link in fds.iterdir() if "memfd:floor" in str(link.readlink()))
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
            try:
                path = tree.set_pfnmap("bench", [MapPart(fd, 0, size, 0)])
                scans, texts = [], []
                for _ in range(ROUNDS):
                    scans.append(timed(partial(ExtentTable.scan_fd, fd, size)))
                    texts.append(timed(partial(read_whole, path)))
                with ExtentTable.scan_fd(fd, size) as table:
                    rows = len(table)
            finally:
                os.close(fd)
        name = f"pfnmap of {format_size(size)}, {shape} ({rows} lines)"
        results.append(Result(name, min(texts) / 1e6, "ms", min(scans) / 1e6, 1.5))
    return results
