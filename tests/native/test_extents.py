"""Scans against the kernel's own word, read independently; and every way a scan can be refused."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Never

import pytest
from support.memory import PAGE, holder, mapped, memfd, need_frames, page_types, read_pagemap
from support.open_fds import nothing_stays_open

from memconsole.errors import BadFile, Denied, Gone, KernelRefused, UsageError
from memconsole.extents import ChangeKind, Extent, ExtentTable, Flag, PageChange, digest_fd, digest_region

MIB = 1 << 20
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; not in Python 3.11's fcntl
BITS = {63: Flag.PRESENT, 62: Flag.SWAP, 61: Flag.FILE, 57: Flag.UFFD_WP, 56: Flag.EXCLUSIVE, 55: Flag.SOFT_DIRTY}


def pages_of(table: ExtentTable) -> dict[int, tuple[int, int]]:
    """Frame and flags of every page of a table of present rows."""
    return {row.offset + i: (row.pfn + i, row.flags & ~Flag.HUGE) for row in table.rows() for i in range(row.count)}


def expected_pages(entries: list[int], base: int = 0) -> dict[int, tuple[int, int]]:
    return {
        base + i: (entry & ((1 << 55) - 1), sum(flag for bit, flag in BITS.items() if entry >> bit & 1))
        for i, entry in enumerate(entries)
        if entry >> 62
    }


def test_a_scan_says_of_every_page_what_the_pagemap_says() -> None:
    need_frames()
    with (
        memfd(8 * MIB) as fd,
        holder(fd, 8 * MIB, "0-700", "900-901", "2047-2048") as (process, address),
        ExtentTable.scan(process.pid, address, 8 * MIB, base=50) as table,
    ):
        assert pages_of(table) == expected_pages(read_pagemap(process.pid, address, 8 * MIB), base=50)
        assert (table.pages, table.first, table.end) == (2048, 50, 2098)
        assert table.stats()[:4] == (2048, 702, 0, 1346)


def test_a_range_of_several_chunks_that_begins_in_the_middle_of_one() -> None:
    """Pages on both sides of every multiple of 512 MiB, where threads hand over to each other."""
    need_frames()
    size = 1280 * MIB
    spans = [f"{page - 3}-{page + 3}" for page in range(32768, size // PAGE, 32768)]
    with memfd(size) as fd, holder(fd, size, *spans) as (process, address):
        start = address + 17 * PAGE
        with ExtentTable.scan(process.pid, start, size - 40 * PAGE, base=17) as table:
            seen = pages_of(table)
            touched = {page for span in spans for page in range(*map(int, span.split("-")))}
            assert set(seen) == touched
            for page in list(touched)[::7]:
                entry = read_pagemap(process.pid, address + page * PAGE, PAGE)[0]
                assert seen[page][0] == entry & ((1 << 55) - 1)
        with ExtentTable.scan_fd(fd, size) as whole:
            assert {page: frame for page, (frame, _) in pages_of(whole).items()} == {
                page: frame for page, (frame, _) in seen.items()
            }


def test_page_types_sees_the_same_frames() -> None:
    need_frames()
    tool = page_types()
    with memfd(4 * MIB) as fd, holder(fd, 4 * MIB, "0-1024") as (process, address):
        first = address // PAGE
        listing = subprocess.run(
            [tool, "-p", str(process.pid), "-a", f"{first}+1024", "-L", "-N"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rows = [line.split() for line in listing.splitlines() if line and line[0] in "0123456789abcdef"]
        listed = {int(row[0], 16) - first: int(row[1], 16) for row in rows if len(row) == 3 and len(row[2]) > 20}
        with ExtentTable.scan(process.pid, address, 4 * MIB) as table:
            assert len(listed) == 1024
            assert {page: pfn for page, (pfn, _) in pages_of(table).items()} == listed


def test_anonymous_huge_pages_are_told_from_small_ones() -> None:
    need_frames()
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off")
    with mmap.mmap(-1, 12 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        del anchor
        aligned = (address + 2 * MIB - 1) // (2 * MIB) * (2 * MIB)
        memory.madvise(mmap.MADV_HUGEPAGE, aligned - address, 4 * MIB)
        memory.madvise(mmap.MADV_NOHUGEPAGE, aligned - address + 4 * MIB, 4 * MIB)
        for at in range(aligned - address, aligned - address + 8 * MIB, PAGE):
            memory[at] = 1
        smaps = Path("/proc/self/smaps").read_text().splitlines()
        if not any(line.startswith("AnonHugePages") and int(line.split()[1]) >= 4096 for line in smaps):
            pytest.skip("the kernel gave no huge pages")
        with ExtentTable.scan(os.getpid(), aligned, 8 * MIB) as table:
            assert table.stats()[:5] == (2048, 2048, 0, 0, 1024)
            assert table.bin(0, 2048, 4).huge == [512, 512, 0, 0]
            assert all(row.offset < 1024 for row in table.rows() if row.flags & Flag.HUGE)


def test_a_hugetlb_memfd_is_scanned_and_digested_without_being_filled() -> None:
    need_frames()
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    try:
        pool.write_text(str(int(before) + 4))
        with memfd(8 * MIB, os.MFD_HUGETLB | (21 << os.MFD_HUGE_SHIFT)) as fd:
            with mapped(fd, 8 * MIB) as memory:
                memory[5 * MIB] = 1
            with ExtentTable.scan_fd(fd, 8 * MIB) as table:
                assert [(row.offset, row.count, row.flags) for row in table.rows()] == [
                    (1024, 512, Flag.PRESENT | Flag.FILE | Flag.HUGE)
                ]
            digest_fd(fd)
            assert os.fstat(fd).st_blocks * 512 == 2 * MIB
    except OSError as error:
        pytest.skip(f"no huge pages to be had: {error}")
    finally:
        pool.write_text(before)


def test_a_file_scan_fills_no_hole_and_agrees_with_the_process_that_maps_it() -> None:
    need_frames()
    with (
        memfd(6 * MIB) as fd,
        holder(fd, 6 * MIB, "10-200", "1000-1030") as (process, address),
        ExtentTable.scan(process.pid, address, 6 * MIB) as mapping,
        ExtentTable.scan_fd(fd, 6 * MIB) as file,
    ):
        assert os.fstat(fd).st_blocks * 512 == 220 * PAGE
        assert mapping.digest() == file.digest()
        assert {row.flags for row in file.rows()} == {Flag.PRESENT | Flag.FILE}
        assert all(change.kind is ChangeKind.FLAGS for change in mapping.diff(file))


def test_kpageflags_and_counts_are_folded_over_rows() -> None:
    need_frames()
    with (
        memfd(MIB) as fd,
        holder(fd, MIB, "0-256") as (process, address),
        mapped(fd, MIB) as memory,
        ExtentTable.scan(process.pid, address, MIB) as table,
    ):
        assert memory[0] == 1  # a second mapping of the first page, and of what the kernel maps around it
        flags, counts = table.page_flags(), table.join_page_counts(0, 1)
        assert len(flags) == len(table)
        assert all(word >> 14 & 1 for word in flags)  # KPF_SWAPBACKED: shmem
        assert counts[0].most == 2
    with ExtentTable.from_rows([Extent(0, 5 << 5, 3, Flag.SWAP)]) as swapped:
        assert swapped.page_flags() == [0]


PRESENT, SWAP, FILE, GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58


def scan_entries(tmp_path: Path, entries: list[int]) -> list[Extent]:
    """The rows of a recorded pagemap: on a plain file there is no PAGEMAP_SCAN to ask."""
    tree = tmp_path / "7"
    tree.mkdir()
    (tree / "pagemap").write_bytes(b"".join(entry.to_bytes(8, "little") for entry in entries))
    with ExtentTable.scan(7, 0, len(entries) * PAGE, root=str(tmp_path)) as table:
        return table.rows()


def test_swapped_pages_keep_type_and_slot_and_merge_by_slot(tmp_path: Path) -> None:
    slots = [SWAP | 2 | slot << 5 for slot in (100, 101, 102, 200)]
    assert scan_entries(tmp_path, [0, *slots, SWAP | FILE | 3 | 201 << 5]) == [
        Extent(1, 2 | 100 << 5, 3, Flag.SWAP),
        Extent(4, 2 | 200 << 5, 1, Flag.SWAP),
        Extent(5, 3 | 201 << 5, 1, Flag.SWAP | Flag.FILE),
    ]


def test_guards_and_page_table_markers_are_absent(tmp_path: Path) -> None:
    marker = SWAP | 31 | 4 << 5
    assert scan_entries(tmp_path, [marker, SWAP | GUARD | 31 | 8 << 5, GUARD, 1 << 55, PRESENT | 9]) == [
        Extent(4, 9, 1, Flag.PRESENT)
    ]


def test_without_pagemap_scan_no_page_is_huge(tmp_path: Path) -> None:
    assert scan_entries(tmp_path, [PRESENT | 1024 + i for i in range(1024)]) == [Extent(0, 1024, 1024, Flag.PRESENT)]


@pytest.mark.parametrize("entry", [PRESENT, PRESENT | FILE | 1 << 56, SWAP])
def test_a_frame_number_of_zero_is_a_hidden_one(tmp_path: Path, entry: int) -> None:
    with pytest.raises(Denied):
        scan_entries(tmp_path, [PRESENT | 5, entry])


def test_a_process_that_is_gone_or_has_no_memory() -> None:
    with memfd(MIB) as fd, holder(fd, MIB, "0-1") as (process, address):
        pagemap = os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY)
        try:
            process.kill()
            process.wait()
            with pytest.raises(Gone, match="cannot be scanned"):
                ExtentTable.scan(process.pid, address, MIB)
            with pytest.raises(Gone, match="ended"):
                ExtentTable.scan_pagemap(pagemap, address, MIB)
        finally:
            os.close(pagemap)
    with pytest.raises(Gone):
        ExtentTable.scan(2, 0, PAGE)  # a kernel thread


def test_a_process_that_exits_during_a_scan_is_an_error_and_not_half_a_table() -> None:
    need_frames()
    size = 8 << 30
    with memfd(size) as fd:
        for _ in range(5):
            with holder(fd, size, *(f"{page}-{page + 1}" for page in range(0, size // PAGE, 9973))) as (process, at):
                timer = threading.Timer(0.0005, process.kill)
                timer.start()
                try:
                    with ExtentTable.scan(process.pid, at, size) as table:
                        assert table.pages == size // PAGE
                except Gone:
                    return
                finally:
                    timer.join()
    pytest.fail("no scan was caught by the exit of its process")


def test_without_capability_frames_are_denied_by_name() -> None:
    need_frames()
    code = """
import ctypes, mmap, os
from memconsole.errors import Denied
from memconsole.extents import ExtentTable
memory = mmap.mmap(-1, 4096)
memory[0] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, so that our own pagemap may be opened
for pid in (os.getpid(), 1):
    try:
        ExtentTable.scan(pid, address, 4096)
    except Denied as error:
        print(error.code, error.why)
"""
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    own, other = result.stdout.splitlines()
    assert own == "Denied the kernel shows frame numbers only to CAP_SYS_ADMIN"
    assert other == "Denied /proc/1/pagemap may not be read by this user"


@pytest.mark.parametrize(
    ("start", "length", "base"),
    [
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (-PAGE, PAGE, 0),
        (0, -PAGE, 0),
        (1 << 62, PAGE, 0),
        (0, 1 << 63, 0),
        (0, PAGE, -1),
    ],
)
def test_ranges_that_mean_nothing(start: int, length: int, base: int) -> None:
    with pytest.raises(UsageError):
        ExtentTable.scan(os.getpid(), start, length, base=base)


def test_a_range_behind_the_address_space_and_an_empty_one() -> None:
    with pytest.raises(UsageError, match="beyond"):
        ExtentTable.scan(os.getpid(), 1 << 56, PAGE)
    with ExtentTable.scan(os.getpid(), 0, 0) as table:
        assert (len(table), table.pages, table.rows()) == (0, 0, [])


def test_files_that_cannot_be_scanned() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(KernelRefused):
            ExtentTable.scan_fd(reader, PAGE)
    finally:
        os.close(reader)
        os.close(writer)
    with memfd(PAGE) as fd, pytest.raises(UsageError):
        ExtentTable.scan_fd(fd, 100)


def test_a_table_travels_by_fd_sealed_and_by_bytes() -> None:
    rows = [
        Extent(0, 100, 5, Flag.PRESENT),
        Extent(9, 50, 1, Flag.PRESENT | Flag.HUGE),
        Extent(12, 7 << 5, 2, Flag.SWAP),
    ]
    with ExtentTable.from_rows(rows, pages=20) as table:
        assert table.rows() == rows == list(table)
        assert os.fstat(table.fd).st_size == 64 + 24 * 3
        for change in (lambda: os.ftruncate(table.fd, 0), lambda: os.pwrite(table.fd, b"x", 0)):
            with pytest.raises(PermissionError):
                change()
        with table.share() as shared:
            assert (shared.rows(), shared.pages, shared.page_size) == (rows, 20, 4096)
            assert os.fstat(shared.fd).st_ino == os.fstat(table.fd).st_ino
        assert table.rows() == rows
        with ExtentTable.from_fd(table.fd) as by_fd, ExtentTable.from_bytes(table.to_bytes()) as by_bytes:
            for other in (by_fd, by_bytes):
                assert other.to_bytes() == table.to_bytes()
                assert (other.rows(), other.pages, other.page_size) == (rows, 20, 4096)


@pytest.mark.parametrize("seals", ["as ours are", "against everything but the mapping"])
def test_a_table_stays_what_was_checked_whatever_its_maker_still_has_mapped(seals: str) -> None:
    with ExtentTable.from_rows([Extent(1, 5, 10, Flag.PRESENT)], pages=1000) as table:
        good = table.to_bytes()
        rows = table.rows()
    fd = os.memfd_create("table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, len(good))
        with mmap.mmap(fd, len(good)) as kept:
            kept[:] = good
            final = fcntl.F_SEAL_SEAL if seals == "as ours are" else 0
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | final)
            with ExtentTable.from_fd(fd) as taken:
                kept[64:] = b"\xff" * (len(good) - 64)  # every column, beyond what the table covers
                assert taken.rows() == rows
                assert taken.to_bytes() == good
            with pytest.raises(BadFile):
                ExtentTable.from_fd(fd)
    finally:
        os.close(fd)


def test_a_table_in_a_plain_file_is_copied(tmp_path: Path) -> None:
    with ExtentTable.from_rows([Extent(3, 4, 5, Flag.PRESENT)]) as table:
        path = tmp_path / "table"
        path.write_bytes(table.to_bytes())
        with path.open("r+b") as file, ExtentTable.from_fd(file.fileno()) as copied:
            file.truncate(0)
            assert copied.rows() == table.rows()


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    with ExtentTable.from_rows([Extent(3, 4, 5, Flag.PRESENT), Extent(30, 4, 5, Flag.PRESENT)]) as table:
        good = table.to_bytes()
    for cut in range(len(good)):
        with pytest.raises(BadFile):
            ExtentTable.from_bytes(good[:cut])
    for bit in range(len(good) * 8):
        spoiled = bytearray(good)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadFile):
            ExtentTable.from_bytes(spoiled)
    with pytest.raises(BadFile):
        ExtentTable.from_bytes(b"")
    with pytest.raises(BadFile):
        ExtentTable.from_bytes(b"\x7fELF" + bytes(200))


def test_moved_appeared_vanished_and_flags_by_hand() -> None:
    old = [Extent(0, 100, 10, 1), Extent(20, 200, 4, 1), Extent(40, 300, 1, 1)]
    new = [
        Extent(0, 100, 4, 1),
        Extent(4, 900, 2, 1),
        Extent(6, 106, 4, 1),
        Extent(20, 200, 4, 65),
        Extent(50, 7, 1, 1),
    ]
    with ExtentTable.from_rows(old) as before, ExtentTable.from_rows(new) as after:
        assert before.diff(after) == [
            PageChange(ChangeKind.MOVED, 4, 2, 104, 900, 1, 1),
            PageChange(ChangeKind.FLAGS, 20, 4, 200, 200, 1, 65),
            PageChange(ChangeKind.VANISHED, 40, 1, 300, 0, 1, 0),
            PageChange(ChangeKind.APPEARED, 50, 1, 0, 7, 0, 1),
        ]


def test_a_closed_table_refuses_every_use() -> None:
    table = ExtentTable.from_rows([Extent(0, 1, 1, 1)])
    table.close()
    table.close()
    for use in (lambda: len(table), table.rows, lambda: table.fd, lambda: table.lookup(0), table.stats):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert repr(table) == "<ExtentTable closed>"


def test_a_digest_does_not_depend_on_threads_or_holes() -> None:
    with memfd(5 * MIB + 123) as fd:
        os.pwrite(fd, os.urandom(MIB), 3 * MIB - 77)
        sparse = {digest_fd(fd, threads) for threads in (1, 2, 7)}
        assert len(sparse) == 1
        assert os.fstat(fd).st_blocks * 512 <= MIB + 2 * PAGE
        os.posix_fallocate(fd, 0, 5 * MIB + 123)
        assert {digest_fd(fd)} == sparse
        whole = digest_region(fd, 0, 5 * MIB + 123)
        assert {whole} == sparse
        os.pwrite(fd, b"\x01", 5 * MIB)
        assert digest_fd(fd) != whole
        assert digest_region(fd, 0, 5 * MIB) == digest_region(fd, 0, 5 * MIB, threads=1)
        with pytest.raises(UsageError):
            digest_region(fd, 0, 6 * MIB)
        with pytest.raises(UsageError):
            digest_region(fd, 0, MIB, threads=1000)


def test_no_permission_is_denied_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> Never:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(Denied, match="may not be read"):
        ExtentTable.scan(os.getpid(), 0, PAGE)


def test_a_thousand_tables_leave_nothing_behind() -> None:
    def mapped() -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum("memconsole-extents" in line for line in maps)

    def use_tables(n: int) -> None:
        for i in range(n):
            with ExtentTable.from_rows([Extent(j * 2, j * 3 + 1, 1, 1) for j in range(50)]) as table:
                table.lookup_pfn(4)
                with ExtentTable.from_bytes(table.to_bytes()) as copy, ExtentTable.concat([copy]) as joined:
                    table.diff(joined)
            ExtentTable.from_rows([])  # closed by its last reference
            with pytest.raises(BadFile):
                ExtentTable.from_bytes(table_bytes[: i % len(table_bytes)])

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with ExtentTable.from_rows([Extent(0, 1, 1, 1)]) as table:
        table_bytes = table.to_bytes()
    use_tables(100)
    before, pages = mapped(), resident()
    with nothing_stays_open():
        use_tables(1000)
    assert mapped() <= before
    assert resident() - pages < 512  # 2 MiB: one row leaked a table would be more


def test_a_table_that_grows_while_a_file_of_many_parts_is_scanned_stays_whole() -> None:
    """Each part is mapped for itself: what the table gets meanwhile must not lie where the next one, or the end, is."""
    pages = 40_000
    fd = os.memfd_create("parts", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, pages * 4096)
        for page in range(0, pages, 2):
            os.pwrite(fd, b"x", page * 4096)
        with ExtentTable.scan_fd(fd, pages * 4096) as table:
            assert table.stats().present == pages // 2
            assert [row.offset for row in table] == list(range(0, pages, 2))
            assert len(table.digest()) == 32
    finally:
        os.close(fd)
