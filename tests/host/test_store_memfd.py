"""The memfd store on this kernel: what it gives, what it refuses, and that nothing is left when it does."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.open_fds import nothing_stays_open

from memconsole.backend.stores import files, memfd
from memconsole.errors import KernelRefused, Refused
from memconsole.model import Access

M = 1 << 20


def _codes(*arguments: int, promised: int = 0) -> list[str]:
    return [refusal.code for refusal in memfd.reserve_refusals(*arguments, promised=promised)]


@pytest.mark.parametrize(
    ("arguments", "codes"),
    [
        ((0,), ["BadSize"]),
        ((-4096,), ["BadSize"]),
        ((4097,), ["BadSize"]),
        ((1 << 63,), ["BadSize"]),
        ((1 << 50,), ["NoMemory"]),
        ((4096, 8192), ["BadPageSize"]),
        ((3 * M, 2 * M), ["BadSize"]),
        ((4096, 4096, 777), ["NoNode"]),
        ((0, 4096, 777), ["BadSize", "NoNode"]),
        ((1 << 50, 1 << 30), ["NoHugePages"]),
        ((64 * M,), []),
    ],
)
def test_check_names_every_reason_and_changes_nothing(arguments: tuple[int, ...], codes: list[str]) -> None:
    with nothing_stays_open():
        assert _codes(*arguments) == codes
        for refusal in memfd.reserve_refusals(*arguments):
            assert refusal.what
            assert refusal.why
            assert refusal.remedy


def test_what_is_promised_to_other_regions_is_not_promised_again() -> None:
    assert _codes(64 * M, promised=1 << 50) == ["NoMemory"]


def test_reserve_refuses_as_check_does() -> None:
    with nothing_stays_open(), pytest.raises(Refused) as caught:
        memfd.reserve_segments("web", 4097)
    assert caught.value.code == "BadSize"
    assert "8K" in caught.value.remedy


def test_a_region_has_its_size_its_seals_and_no_frames_yet() -> None:
    (fd,) = fds = memfd.reserve_segments("web", 8 * M)
    assert os.fstat(fd).st_size == 8 * M
    assert os.fstat(fd).st_mode & 0o777 == 0o600
    assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "/memfd:memconsole:web:0 (deleted)"
    assert files.seals(fd) == ("grow",)
    assert files.resident_bytes(fds) == 0
    assert files.segments(fds)[0].inode == os.fstat(fd).st_ino
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 16 * M)
    memfd.free_segments(fds)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_prefault_puts_every_page_in_place() -> None:
    fds = memfd.reserve_segments("web", 8 * M, prefault=True)
    assert files.resident_bytes(fds) == 8 * M
    memfd.free_segments(fds)


def test_filling_puts_what_is_missing_in_place_and_changes_nothing_else() -> None:
    fds = memfd.reserve_segments("web", 4 * M)
    os.pwrite(fds[0], b"kept", M)
    memfd.fill_segments(fds)
    assert files.resident_bytes(fds) == 4 * M
    assert os.pread(fds[0], 4 * M, 0) == bytes(M) + b"kept" + bytes(3 * M - 4)
    memfd.free_segments(fds)


def test_what_cannot_be_filled_stays_as_it_is() -> None:
    fds = memfd.reserve_segments("web", 4 * M)
    fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    memfd.fill_segments(fds)
    assert files.resident_bytes(fds) == 0
    os.close(fds[0])


def test_a_large_region_is_made_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SEGMENT", 4 * M)
    fds = memfd.reserve_segments("web", 10 * M, prefault=True)
    assert [segment.size for segment in files.segments(fds)] == [4 * M, 4 * M, 2 * M]
    assert files.resident_bytes(fds) == 10 * M
    memfd.free_segments(fds)


def test_a_region_comes_from_the_node_that_was_asked_for() -> None:
    if not Path("/sys/devices/system/node/node0").is_dir():
        pytest.skip("this kernel knows no NUMA nodes")
    fds = memfd.reserve_segments("web", 2 * M, 4096, 0, prefault=True)
    with mmap.mmap(fds[0], 2 * M) as mapping:
        assert mapping[0] == 0
        rows = Path("/proc/self/numa_maps").read_text().splitlines()
        (row,) = (row for row in rows if "memconsole:web:0" in row)
    assert "bind:0" in row
    memfd.free_segments(fds)


def test_who_holds_a_given_fd_cannot_forbid_us_to_take_the_memory() -> None:
    (fd,) = memfd.reserve_segments("web", M)
    given = memfd.segment_fd(fd, Access.RW)
    assert files.seals(fd) == ("seal", "grow")
    with pytest.raises(PermissionError):
        fcntl.fcntl(given, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memfd.free_segments([fd])
    assert os.fstat(given).st_size == 0
    with pytest.raises(PermissionError):
        os.ftruncate(given, M)
    os.close(given)


def test_a_read_only_fd_cannot_be_mapped_for_writing() -> None:
    (fd,) = memfd.reserve_segments("web", M)
    given = memfd.segment_fd(fd, Access.RO)
    with pytest.raises(PermissionError):
        mmap.mmap(given, M)
    with mmap.mmap(given, M, access=mmap.ACCESS_READ) as mapping:
        assert mapping[0] == 0
    os.close(given)
    memfd.free_segments([fd])


def test_a_given_fd_has_a_position_of_its_own() -> None:
    (fd,) = memfd.reserve_segments("web", M)
    given = memfd.segment_fd(fd, Access.RW)
    os.lseek(given, 4096, os.SEEK_SET)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    os.close(given)
    memfd.free_segments([fd])


def test_a_segment_that_cannot_be_truncated_is_not_closed() -> None:
    (fd,) = memfd.reserve_segments("web", M)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(KernelRefused, match="cannot be freed"):
        memfd.free_segments([fd])
    os.close(fd)


def test_two_mebibyte_pages_come_from_their_pool() -> None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not os.access(pool, os.W_OK) or os.geteuid():
        pytest.skip("the pool of 2 MiB pages cannot be grown here")
    before = int(pool.read_text())
    pool.write_text(str(before + 2))
    try:
        if int(pool.read_text()) < before + 2:
            pytest.skip("the kernel has no two free 2 MiB blocks for its pool")
        fds = memfd.reserve_segments("web", 4 * M, 2 * M)
        # Set aside at once: a second region cannot take the same pages.
        assert _codes(4 * M, 2 * M) == ["NoHugePages"]
        with mmap.mmap(fds[0], 4 * M) as mapping:
            mapping[2 * M] = 1
        assert files.resident_bytes(fds) == 2 * M
        memfd.free_segments(fds)
        assert _codes(4 * M, 2 * M) == []
    finally:
        pool.write_text(str(before))


PREFAULTED = """
import os, pathlib
from memconsole.backend.stores import memfd
(fd,) = memfd.reserve_segments("big", 768 << 20, prefault=True)
status = pathlib.Path("/proc/self/status").read_text().split()
print(os.fstat(fd).st_blocks * 512 >> 20, int(status[status.index("VmHWM:") + 1]) >> 10)
"""


def test_what_is_put_in_place_is_in_the_region_and_not_in_this_process() -> None:
    said = subprocess.run([sys.executable, "-c", PREFAULTED], capture_output=True, text=True, check=True).stdout
    in_place, most_resident = map(int, said.split())
    assert in_place == 768
    assert most_resident < 768 // 2
