"""What devices reach: a dump of page tables parsed and coalesced, and the audit of a large host."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from harness import ROOT, Result, span

from memconsole.backend.kernel import vtd

sys.path.insert(0, str(ROOT / "tests"))
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
