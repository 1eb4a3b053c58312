"""What devices reach: a dump of page tables parsed and coalesced, and the audit of a large host."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from harness import ROOT, Result, span
from msgspec.structs import replace

from memconsole.backend import findings
from memconsole.backend.dma import check
from memconsole.backend.kernel import vtd
from memconsole.extents import Extent, ExtentTable, Flag, Part
from memconsole.model import Finding, Survival

sys.path.insert(0, str(ROOT / "tests"))
from support import synthetic
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
    with vtd.parse(pieces, BDF) as table:
        took = time.perf_counter_ns() - begin
        rows, kept = len(table), table.nbytes
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
        Result("bytes kept of a byte of such a dump", kept / size, ""),
    ]


GUESTS, EXTENTS = 1000, 1000
RW = Flag.PRESENT | Flag.READ | Flag.WRITE


def bench_audit() -> list[Result]:
    """Of 1,000 guests, each with a device and a region in 1,000 runs of frames; a tenth of them reach too much."""
    host = replace(synthetic.snapshot(GUESTS, GUESTS, findings=0), survival=Survival(kho=True, luo=True))
    pages = 16
    given = replace(host.grants[0], offset=0, gpa=0, length=EXTENTS * pages * 4096, dma=BDF)
    grants = [replace(given, id=f"g{number}", guest=guest.name) for number, guest in enumerate(host.guests)]
    regions, devices = [], []
    for number in range(GUESTS):
        runs = [(n * pages, 2 * n * pages + number) for n in range(EXTENTS)]
        regions.append(ExtentTable.from_rows(Extent(at, pfn, pages, Flag.PRESENT | Flag.FILE) for at, pfn in runs))
        stray = [Extent(pages * EXTENTS + 8, 5, 1, RW)] if number % 10 == 0 else []
        devices.append(ExtentTable.from_rows([*(Extent(at, pfn, pages, RW) for at, pfn in runs), *stray]))

    def audit() -> list[Finding]:
        found = [*findings.find(host, [])]
        for grant, region, device in zip(grants, regions, devices, strict=True):
            differences = check.compare([grant], device, {grant.id: Part(region, 0, region.end, 0)})
            found += check.told(BDF, [grant], differences)
        return found

    begin = time.perf_counter_ns()
    found = audit()
    took = (time.perf_counter_ns() - begin) / 1e9
    assert sum(each.id == "dma-unknown" for each in found) == GUESTS // 10
    rows = sum(map(len, regions))
    return [Result(f"audit of {GUESTS:,} guests with {rows:,} extents", took, "s", None, 2)]
