"""AMD's I/O page tables, walked in memory that is written from the specification."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.capabilities import unprivileged
from support.handover_image import Cells
from support.iotables import READ, WRITE, AmdHost
from support.trees import Tree

from memconsole.backend.kernel import amdvi, iommu
from memconsole.backend.kernel.vtd import Budget, TooMany
from memconsole.errors import BadFile, Denied, NotFound
from memconsole.extents import Extent, Flag

NIC = "0000:41:00.1"
RW = Flag.PRESENT | Flag.READ | Flag.WRITE
LEAVES = [
    (0x10, 0x100, 1, 3),
    (0x11, 0x101, 1, 3),
    (0x12, 0x102, 1, 1),  # read only: another run
    (0x200, 0x40000, 512, 3),
    (0x400, 0x48000, 1024, 3),  # 4 MiB in two entries
    (0x1000, 0x9000, 8, 2),  # 32 KiB in eight
    (0x40000, 0x80000, 1 << 18, 3),
]
ROWS = [
    Extent(0x10, 0x100, 2, RW),
    Extent(0x12, 0x102, 1, Flag.PRESENT | Flag.READ),
    Extent(0x200, 0x40000, 512, RW | Flag.HUGE),
    Extent(0x400, 0x48000, 1024, RW | Flag.HUGE),
    Extent(0x1000, 0x9000, 8, Flag.PRESENT | Flag.WRITE | Flag.HUGE),
    Extent(0x40000, 0x80000, 1 << 18, RW | Flag.HUGE),
]


@pytest.fixture
def made(tmp_path: Path) -> AmdHost:
    tree = Tree(tmp_path)
    tree.host()
    tree.pci(NIC, ids=(0x15B3, 0x1021), class_code=0x020000, driver="vfio-pci", group=9)
    tree.group(9, "DMA-FQ", [(0xFEE00000, 0xFEEFFFFF, "msi")])
    tree.iommu("ivhd0", [NIC], "amd-iommu", {"cap": "1", "features": "2"})
    return AmdHost(tree)


@pytest.mark.parametrize("levels", [4, 6])
def test_the_tables_of_a_device_by_registers_and_device_table(made: AmdHost, levels: int) -> None:
    made.device(NIC, made.page_tables(LEAVES, levels))
    made.write()
    with iommu.table(made.tree.root, "9") as table:
        assert list(table) == ROWS
    (domain,) = iommu.domains(made.tree.root)
    assert (domain.extents, domain.mapped, domain.why_not) == (6, sum(row.count for row in ROWS) * 4096, "")


def test_the_tables_of_a_device_by_debugfs(made: AmdHost) -> None:
    word = made.page_tables(LEAVES)
    made.write()
    made.debugfs(NIC, word)
    (made.tree.root / "dev/mem").unlink()
    with amdvi.table(made.tree.root, NIC) as table:
        assert list(table) == ROWS
    assert (made.tree.root / "sys/kernel/debug/iommu/amd/devid").read_text() == f"{NIC}\n"
    made.debugfs("0000:00:00.2", word)
    with pytest.raises(NotFound, match="no entry"):
        amdvi.table(made.tree.root, NIC)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (0, "not valid"),
        (3 | READ | WRITE, "identity"),
        (3 | 1 << 55 | READ, "pgtbl_v2"),
    ],
)
def test_an_entry_without_tables_says_why(made: AmdHost, word: int, why: str) -> None:
    made.device(NIC, word)
    made.write()
    (domain,) = iommu.domains(made.tree.root)
    assert domain.mapped is None
    assert why in domain.why_not


def test_a_blocked_device_reaches_nothing(made: AmdHost) -> None:
    made.device(NIC, 3)
    made.write()
    with amdvi.table(made.tree.root, NIC) as table:
        assert len(table) == 0


def test_what_is_no_table_is_refused(made: AmdHost) -> None:
    deeper = made.memory.put(struct.pack("<Q", 1 | 5 << 9 | READ))
    gone = made.memory.put(struct.pack("<Q", 1 | 3 << 9 | 0x7FFFF000 | READ))
    itself = made.memory.put()
    made.memory.write(itself, struct.pack("<Q", 1 | 3 << 9 | itself | READ))
    tiny = made.memory.put(struct.pack("<Q", 1 | 7 << 9 | READ))
    for root in (deeper, gone, itself, tiny):
        with pytest.raises(BadFile, match="corrupt"):
            list(amdvi.leaves(3 | 4 << 9 | root | READ | WRITE, NIC, made.memory))
    with pytest.raises(BadFile, match="7 levels"):
        list(amdvi.leaves(3 | 7 << 9 | gone | READ, NIC, made.memory))


def test_a_budget_is_kept(made: AmdHost) -> None:
    word = made.page_tables([(page, page, 1, 3) for page in range(100)])
    assert sum(row.count for row in amdvi.leaves(word, NIC, made.memory, Budget(103))) == 100
    with pytest.raises(TooMany):
        list(amdvi.leaves(word, NIC, made.memory, Budget(102)))


def test_memory_that_is_not_shown_is_a_reason(made: AmdHost) -> None:
    with pytest.raises(NotFound, match="physical memory"):
        amdvi.table(made.tree.root, NIC)
    (domain,) = iommu.domains(made.tree.root)
    assert "kcore" in domain.why_not


def test_a_table_that_is_not_this_users_to_read_is_denied(made: AmdHost) -> None:
    made.write()
    (made.tree.root / "dev/mem").chmod(0)
    with unprivileged(), pytest.raises(Denied):
        amdvi.table(made.tree.root, NIC)


WORD = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda page, below, bits: 0x101000 + page * 4096 | below << 9 | bits,
        st.integers(0, 6),
        st.integers(0, 7),
        st.integers(0, 3),
    ),
)


@given(st.lists(st.tuples(st.integers(0, 7 * 512 - 1), WORD), max_size=60), WORD)
def test_any_memory_is_rows_or_an_error(words: list[tuple[int, int]], entry: int) -> None:
    memory = Cells()
    memory.put(pages=8)
    for index, word in words:
        memory.write(0x101000 + index * 8, struct.pack("<Q", word))
    with suppress(BadFile, NotFound, TooMany):
        end = 0
        for row in amdvi.leaves(entry, NIC, memory, Budget(10_000)):
            assert row.offset >= end
            assert row.pfn < 1 << 40
            end = row.offset + row.count


@given(st.binary(max_size=120))
def test_any_ivrs_is_read_or_refused(raw: bytes) -> None:
    with suppress(BadFile):
        list(amdvi._blocks(b"IVRS".ljust(48, b"\0") + raw, 0))
