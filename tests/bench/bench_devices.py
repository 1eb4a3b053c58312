"""What devices reach: a dump of page tables parsed and coalesced, memory mapped, and the audit of a large host."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator

from harness import ROOT, Result, span
from labs import said
from msgspec.structs import replace

from memconsole.backend.dma import check
from memconsole.backend.dma.frame_owners import Owners
from memconsole.backend.kernel import vtd
from memconsole.backend.observe import findings
from memconsole.extents import Extent, ExtentTable, Flag, Part
from memconsole.model import Finding, Survival

sys.path.insert(0, str(ROOT / "tests"))
from support import synthetic
from support.memory import growth
from support.trees import intel_dump

BDF = "0000:41:00.0"
LEAVES = 2048


def dump(size: int) -> Iterator[bytes]:
    """Pieces of a dump of at least ``size`` bytes: one page in eight begins another run."""
    head, leaves = intel_dump(BDF, []).encode().rstrip(b"\n") + b"\n", b""
    yield head
    iova = 0
    while size > 0:
        rows = [(iova + n, 2 * iova + n + n // 8 * 8, 1, 3) for n in range(LEAVES)]
        leaves = intel_dump(BDF, rows).encode().split(b"\n", 2)[2][:-1]
        iova += LEAVES
        size -= len(leaves)
        yield leaves


def bench_dump() -> list[Result]:
    """Against memchr and a copy of the same bytes: what anybody who looks at every line pays."""
    pieces = list(dump(span("256M")))
    size = sum(map(len, pieces))
    begin = time.perf_counter_ns()
    with growth() as grown, vtd.parse(pieces, BDF) as table:
        took = time.perf_counter_ns() - begin
        rows, kept, peak = len(table), os.fstat(table.fd).st_size, grown()
    begin = time.perf_counter_ns()
    for piece in pieces:
        piece.count(b"\n")
    floor = time.perf_counter_ns() - begin
    return [
        Result(
            f"page table dump of {size >> 20} MiB into {rows:,} rows, against counting its lines",
            size / took * 1e3,
            "MB/s",
            size / floor * 1e3,
            150,
            "higher",
            absolute=True,
        ),
        Result("peak memory of that, against the rows that are kept", peak / 2**20, "MiB", kept / 2**20, 2.2),
    ]


def bench_map() -> list[Result]:
    """``map --dma`` of 1 GiB of populated memory in the lab, against IOMMU_IOAS_MAP_FILE of as many pages."""
    rows = []
    for each in said("dma_cost", "dma", "1024", str(ROUNDS), memory="4G"):
        floor, name = min(each["bare_ns"]) / 1e6, f"map --dma of 1G, {each['page']} pages"
        rows += [
            Result(f"{name}: its step, against IOMMU_IOAS_MAP_FILE", min(each["step_ns"]) / 1e6, "ms", floor, 1.1),
            Result(f"{name}: all of it", min(each["whole_ns"]) / 1e6, "ms", floor),
        ]
    return rows


GUESTS, EXTENTS, ROUNDS = 1000, 1000, 6
RW, FILE = int(Flag.PRESENT | Flag.READ | Flag.WRITE), int(Flag.PRESENT | Flag.FILE)


def bench_audit() -> list[Result]:
    """Of 1,000 guests, each with a device and a region in 1,000 runs of frames; a tenth of them reach the next one's.

    Then of as many whose devices all find other frames than their regions have, in every run.
    """
    host = replace(synthetic.snapshot(GUESTS, GUESTS, findings=0), survival=Survival(kho=True, luo=True))
    pages = 16
    given = replace(host.grants[0], offset=0, gpa=0, length=EXTENTS * pages * 4096, dma=BDF)
    grants = [
        replace(given, id=f"g{number}", guest=guest.name, region=f"r{number}")
        for number, guest in enumerate(host.guests)
    ]
    regions, devices, wrong = [], [], []
    for number in range(GUESTS):
        first = 2 * pages * EXTENTS * number
        runs = [(n * pages, first + 2 * n * pages) for n in range(EXTENTS)]
        regions.append(ExtentTable.from_rows(Extent(at, pfn, pages, FILE) for at, pfn in runs))
        stray = [Extent(pages * EXTENTS + 8, first + 2 * pages * EXTENTS, 1, RW)] if number % 10 == 0 else []
        devices.append(ExtentTable.from_rows([*(Extent(at, pfn, pages, RW) for at, pfn in runs), *stray]))
        wrong.append(ExtentTable.from_rows(Extent(at, pfn + pages, pages, RW) for at, pfn in runs))

    def audit(devices: list[ExtentTable]) -> list[Finding]:
        found = [*findings.find(host, [])]
        with contextlib.ExitStack() as stack:
            known = ((grant.region, region) for grant, region in zip(grants, regions, strict=True))
            owners = functools.cache(lambda: stack.enter_context(Owners(known)))
            for grant, region, device in zip(grants, regions, devices, strict=True):
                found += check.table_findings(BDF, [grant], device, {grant.id: Part(region, 0, region.end, 0)}, owners)
        return found

    rows, results = sum(map(len, regions)), []
    for tables, id, count, title in (
        (devices, "frame-shared", GUESTS // 10, "audit of {} guests with {} extents, 1 device in 10 astray"),
        (wrong, "dma-elsewhere", GUESTS, "audit of {} guests with {} extents, every one of them elsewhere"),
    ):
        begin = time.perf_counter_ns()
        found = audit(tables)
        took = (time.perf_counter_ns() - begin) / 1e9
        assert sum(each.id == id for each in found) == count
        results.append(Result(title.format(f"{GUESTS:,}", f"{rows:,}"), took, "s", None, 2))
    return results
