"""The files behind a process's shared memory: what each is, and that custody gets the same one; on this process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from memconsole.backend.kernel import census
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.stores import adopted
from memconsole.errors import Gone, GuestError
from memconsole.model import Guest, GuestKind, GuestState

M = 1 << 20


@pytest.fixture
def mapped() -> Iterator[int]:
    """A memfd of 4 MiB that this process maps shared, with "here" in it."""
    fd = os.memfd_create("some-ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * M)
    with mmap.mmap(fd, 4 * M) as memory:
        memory[M : M + 4] = b"here"
        yield fd
    os.close(fd)


def this_process() -> Guest:
    pid = os.getpid()
    return Guest("this", GuestKind.FOREIGN, GuestState.RUNNING, pid, census.process("/", pid).start_ticks)


def test_a_memfd_that_a_process_maps_is_found_and_opened_by_what_it_is(mapped: int) -> None:
    (found,) = [each for each in adopted.files_of("/", this_process()) if each.inode == os.fstat(mapped).st_ino]
    assert (found.kind, found.size, found.can_be_held, found.path) == ("memfd", 4 * M, True, "/memfd:some-ram")
    assert adopted.why_not(found) is None
    fd = adopted.opened("/", os.getpid(), found)
    try:
        assert fd != mapped
        assert os.pread(fd, 4, M) == b"here"
        assert not adopted.has_name(fd)
    finally:
        os.close(fd)
    with pytest.raises(GuestError, match="has it open no more"):
        adopted.opened("/", os.getpid(), found._replace(inode=found.inode + 1))


def test_a_process_that_ended_or_whose_number_is_anothers_is_gone(mapped: int) -> None:
    one = this_process()
    for pid, ticks in ((one.pid, (one.start_ticks or 0) + 1), (2**22 + 1, 7)):
        with pytest.raises(Gone):
            adopted.files_of("/", Guest("other", GuestKind.FOREIGN, GuestState.RUNNING, pid, ticks))


def vma(start: int, size: int, offset: int, inode: int = 9, device: int = 1, perms: str = "rw-s") -> Vma:
    return Vma(start, start + size, perms, offset, device, inode, "/x", deleted=False)


def test_a_file_mapped_in_pieces_is_one_and_a_second_mapping_of_it_none() -> None:
    pieces = [vma(0x10000, M, 0), vma(0x10000 + M, M, M), vma(0x90000000, M, 0), vma(0x20000000, M, 0, inode=0)]
    assert adopted.files([*pieces, vma(0x50000000, M, 0, inode=5, perms="rw-p")], {1: "memfd"}) == (
        adopted.RamFile(0x10000, 2 * M, 1, 9, "memfd", "/x"),
    )


@pytest.mark.parametrize(("device", "kind", "code"), [(2, "hugetlb", "HugePages"), (3, "ext4", "NotInMemory")])
def test_what_live_update_does_not_carry_is_refused(device: int, kind: str, code: str) -> None:
    (found,) = adopted.files([vma(0, M, 0, device=device)], {1: "memfd", 3: "ext4"})
    error = adopted.why_not(found)
    assert found.kind == kind
    assert error is not None
    assert (error.code, bool(error.remedy)) == (code, True)


def test_a_file_of_a_tmpfs_is_told_from_one_of_a_disk(tmp_path: Path) -> None:
    kinds = adopted.kinds_of("/", os.getpid())
    fd = os.memfd_create("x", os.MFD_CLOEXEC)
    assert kinds[os.fstat(fd).st_dev] == "memfd"
    assert adopted.has_name(fd) is False
    os.close(fd)
    shm = Path("/dev/shm")
    if shm.is_mount():
        assert kinds[shm.stat().st_dev] == "file"
    with (tmp_path / "named").open("wb") as file:
        assert adopted.has_name(file.fileno())
