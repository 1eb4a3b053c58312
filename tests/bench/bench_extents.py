"""Scans, digests and questions to a table against their floors."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from harness import ROOT, Result, best, floor_program, holder, span, timed

from memconsole.extents import Extent, ExtentTable, Flag, digest_fd
from memconsole.units import format_size

ROUNDS = 7


def page_types() -> str | None:
    """The kernel's page-types: MEMCONSOLE_PAGE_TYPES, on PATH, or in the shared lab beside the tree."""
    candidates = [
        os.environ.get("MEMCONSOLE_PAGE_TYPES"),
        shutil.which("page-types"),
        ROOT / "../shared/lab/page-types",
    ]
    return next((str(path) for path in candidates if path and Path(path).exists()), None)


def bench_scan() -> list[Result]:
    """Scan and extents of a populated memfd, against bare preads of the same pagemap in C, and page-types."""
    size = span("4G")
    floors, scans = [], []
    with holder(size) as (pid, address):
        bare = [floor_program(), "pagemap", str(pid), str(address), str(size)]
        for _ in range(ROUNDS):  # in turns, so that a busy moment of the host hits both
            floors.append(int(subprocess.check_output(bare)))
            scans.append(timed(lambda: ExtentTable.scan(pid, address, size)))
        with ExtentTable.scan(pid, address, size) as table:
            rows = len(table)
        name = f"scan of {format_size(size)} in 4K pages ({rows} rows)"
        results = [Result(name, min(scans) / 1e6, "ms", min(floors) / 1e6, 1.15, "lower")]
        tool = page_types()
        if tool is None:
            print("bench_scan: no page-types (MEMCONSOLE_PAGE_TYPES): not compared with it")
            return results
        command = [tool, "-p", str(pid)]
        kernel = min(timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(2))
        results.append(Result("page-types -p over our scan", kernel / 1e6, "ms", min(scans) / 1e6, 8, "higher"))
    return results


def bench_digest() -> list[Result]:
    """The digest of a populated memfd, against reading as much mapped memory with as many threads."""
    size, threads = span("2G"), os.cpu_count() or 1
    floor = int(subprocess.check_output([floor_program(), "read", str(size), str(threads)]))
    fd = os.memfd_create("bench", os.MFD_CLOEXEC)
    try:
        block = os.urandom(1 << 20)
        for _ in range(size >> 20):
            os.write(fd, block)
        took = best(lambda: digest_fd(fd, threads))
    finally:
        os.close(fd)
    return [
        Result(f"digest of {format_size(size)}, {threads} threads", size / took, "GB/s", size / floor, None, "higher")
    ]


def bench_table() -> list[Result]:
    """Questions to a table of a million rows (a badly fragmented guest of 1 TiB)."""
    rows = [Extent(i * 256, i * 999983 % (1 << 38), 256, Flag.PRESENT) for i in range(1_000_000)]
    with ExtentTable.from_rows(rows) as table, ExtentTable.from_bytes(table.to_bytes()) as copy:
        table.lookup_pfn(0)
        pages = table.pages
        return [
            Result("bin 1,000,000 rows into 4,000 cells", best(lambda: table.bin(0, pages, 4000)) / 1e6, "ms"),
            Result("diff of two tables of 1,000,000 rows", best(lambda: table.diff(copy)) / 1e6, "ms"),
            Result("lookup of a frame among 1,000,000 rows", best(lambda: table.lookup_pfn(5)) / 1e3, "us"),
        ]
