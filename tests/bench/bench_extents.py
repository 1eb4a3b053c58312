"""Scans, digests and questions to a table against their floors."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from harness import ROOT, Result, best, floors, holder, span, timed

from memconsole.extents import Extent, ExtentTable, Flag, digest_fd
from memconsole.units import format_size

ROUNDS = 21


def page_types() -> str | None:
    """The kernel's page-types: MEMCONSOLE_PAGE_TYPES, on PATH, or in the shared lab beside the tree."""
    candidates = [
        os.environ.get("MEMCONSOLE_PAGE_TYPES"),
        shutil.which("page-types"),
        ROOT / "../shared/lab/page-types",
    ]
    return next((str(path) for path in candidates if path and Path(path).exists()), None)


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Everything this thread does, and the threads it starts, on one CPU."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(usable)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def scan_against_floor(pid: int, address: int, size: int, shape: str, goal: float | None) -> list[Result]:
    """Scan and extents in ms, held against bare preads of the same pagemap in C by one thread, in turns.

    On one CPU it is the median of CPU time, which does not count what else the host does; on all CPUs the least of
    time that passed. Both reuse the memory of the round before.
    """
    library = floors()
    bare: list[float] = []
    scans: list[float] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)

    def cost(clock: Callable[[], int], function: Callable[[], object]) -> float:
        begin = clock()
        made = function()
        took = clock() - begin
        if isinstance(made, ExtentTable):
            made.close()
        return took / 1e6

    def in_turns(clock: Callable[[], int]) -> None:
        bare.clear()
        scans.clear()
        for _ in range(ROUNDS):
            bare.append(cost(clock, lambda: library.floor_pagemap(fd, address, size)))
            scans.append(cost(clock, lambda: ExtentTable.scan_pagemap(fd, address, size)))

    try:
        with ExtentTable.scan_pagemap(fd, address, size) as table:
            name = f"scan of {format_size(size)}, {shape} 4K pages ({len(table)} rows)"
            sealed = timed(lambda: table.fd)
        with one_cpu():
            in_turns(time.process_time_ns)
        results = [Result(f"{name}, one CPU", median(scans), "ms", median(bare), goal)]
        in_turns(time.perf_counter_ns)
        results.append(Result(f"{name}, all CPUs", min(scans), "ms", min(bare), goal))
        results.append(Result(f"the memfd of such a table, {shape}", sealed / 1e6, "ms"))
    finally:
        os.close(fd)
    return results


def bench_scan() -> list[Result]:
    """Scan and extents of a populated memfd, against the bare read, and against the kernel's page-types."""
    size = span("4G")
    with holder(size) as (pid, address):
        results = scan_against_floor(pid, address, size, "touched", 1.15)
        tool = page_types()
        if tool is None:
            print("bench_scan: no page-types (MEMCONSOLE_PAGE_TYPES): not compared with it")
        else:
            command = [tool, "-p", str(pid)]
            took = best(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 3)
            results.append(Result("page-types -p, against our scan", took / 1e6, "ms", results[1].value, 8, "higher"))
    return results


def bench_scan_scattered() -> list[Result]:
    """The same where nearly every page is a row of its own: the worst a host can look like."""
    size = span("4G")
    with holder(size, stride=7) as (pid, address):
        return scan_against_floor(pid, address, size, "scattered", None)


def bench_digest() -> list[Result]:
    """The digest of a populated memfd, against reading as much mapped memory with as many threads."""
    size, threads = span("2G"), os.cpu_count() or 1
    floor = floors().floor_read(size, threads)
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    try:
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            os.write(fd, block)
        took = best(lambda: digest_fd(fd, threads))
    finally:
        os.close(fd)
    return [
        Result(f"digest of {format_size(size)}, {threads} threads", size / took, "GB/s", size / floor, 0.7, "higher")
    ]


def bench_table() -> list[Result]:
    """Questions to a table of a million rows (a badly fragmented guest of 1 TiB)."""
    rows = [Extent(i * 256, i * 999983 % (1 << 38), 256, Flag.PRESENT) for i in range(1_000_000)]
    with ExtentTable.from_rows(rows) as table, ExtentTable.from_bytes(table.to_bytes()) as copy:
        for _ in range(16):  # asked often, it keeps an index
            table.lookup_pfn(0)
        pages = table.pages
        return [
            Result("bin 1,000,000 rows into 4,000 cells", best(lambda: table.bin(0, pages, 4000)) / 1e6, "ms"),
            Result("diff of two tables of 1,000,000 rows", best(lambda: table.diff(copy)) / 1e6, "ms"),
            Result("lookup of a frame among 1,000,000 rows", best(lambda: table.lookup_pfn(5)) / 1e3, "us"),
        ]
