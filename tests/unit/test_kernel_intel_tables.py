"""Dumps of the page tables of Intel's IOMMU: extents that coalesce, budgets, and what is no dump."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.memory import growth
from support.trees import intel_dump

from memconsole.backend.kernel import vtd
from memconsole.errors import BadFile
from memconsole.extents import Extent, Flag

GPU = "0000:41:00.0"
RW = Flag.PRESENT | Flag.READ | Flag.WRITE


def runs(dump: str, chunk: int = 1 << 20) -> list[Extent]:
    raw = dump.encode()
    with vtd.parse((raw[at : at + chunk] for at in range(0, len(raw), chunk)), GPU) as table:
        assert table.pages == sum(row.count for row in table)
        return list(table)


@pytest.mark.parametrize("padded", [False, True])
def test_leaves_coalesce_while_iova_pfn_and_access_follow(padded: bool) -> None:
    leaves = [
        (0x10, 0x100, 1, 3),
        (0x11, 0x101, 1, 3),
        (0x12, 0x102, 1, 1),  # read only: another run
        (0x13, 0x200, 1, 1),  # elsewhere
        (0x15, 0x201, 1, 1),  # a hole in IOVA
        (0x200, 0x40000, 2, 3),
        (0x400, 0x40200, 2, 3),
        (0x40000, 0x80000, 3, 2),
    ]
    read = Flag.PRESENT | Flag.READ
    assert runs(intel_dump(GPU, leaves, padded=padded)) == [
        Extent(0x10, 0x100, 2, RW),
        Extent(0x12, 0x102, 1, read),
        Extent(0x13, 0x200, 1, read),
        Extent(0x15, 0x201, 1, read),
        Extent(0x200, 0x40000, 1024, RW | Flag.HUGE),
        Extent(0x40000, 0x80000, 1 << 18, Flag.PRESENT | Flag.WRITE | Flag.HUGE),
    ]


@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
def test_the_pieces_a_dump_comes_in_do_not_matter(chunk: int) -> None:
    dump = intel_dump(GPU, [(page * 2, page, 1, 3) for page in range(50)])
    assert runs(dump, chunk) == runs(dump)


def test_a_table_with_a_pasid_is_a_process_and_not_the_device() -> None:
    own = intel_dump(GPU, [(3, 4, 1, 3)], pasid=0)
    assert runs(own + intel_dump(GPU, [(1, 9, 1, 3)], pasid=0x1F)) == [Extent(3, 4, 1, RW)]


def test_a_long_run_is_one_row_and_a_long_dump_is_never_held() -> None:
    sizes = []

    def chunks() -> Iterator[bytes]:
        yield intel_dump(GPU, []).encode().rstrip(b"\n") + b"\n"
        for first in range(0, 200_000, 1000):
            whole = intel_dump(GPU, [(page, page, 1, 3) for page in range(first, first + 1000)])
            text = "\n".join(whole.split("\n")[2:-1]).encode()
            sizes.append(len(text))
            yield text

    with growth() as grown, vtd.parse(chunks(), GPU) as table:
        assert list(table) == [Extent(0, 0, 200_000, RW)]
        assert grown() < 4 << 20 < 20 << 20 < sum(sizes)


def test_a_budget_is_kept_and_shared() -> None:
    dump = intel_dump(GPU, [(page, page, 1, 3) for page in range(10)]).encode()
    budget = vtd.Budget(15)
    vtd.parse([dump], GPU, budget).close()
    assert budget.leaves == 5
    with pytest.raises(vtd.TooMany):
        vtd.parse([dump], GPU, budget)


@pytest.mark.parametrize(
    "dump",
    [
        "Invalid device or pasid!\n",
        intel_dump(GPU, [(1, 2, 1, 3)]).rstrip("\n"),
        intel_dump(GPU, [(1, 2, 1, 3)]).replace("|", "!"),
        intel_dump(GPU, [(1, 2, 1, 3)]).split("\n", 2)[2],
        intel_dump(GPU, [(1, 0, 4, 3)]),
        intel_dump(GPU, [(2, 2, 1, 3), (1, 1, 1, 3)]),
        intel_dump(GPU, [(512, 512, 2, 3), (513, 1, 1, 3)]),
        intel_dump(GPU, [(1, 2, 1, 3)]).replace("0x0000000000001", "0X0000000000001"),
        f"Device {GPU} with pasid  @0x1000\n",
        f"Device {GPU}\n",
        f"Device {GPU} @0x1000\n0x1 |\t0x0\t0x0\t0x0\t0x0\t0x0\n",
    ],
)
def test_a_dump_that_is_not_as_the_kernel_writes_it_is_named(dump: str) -> None:
    with pytest.raises(BadFile, match="domain_translation_struct"):
        runs(dump)
