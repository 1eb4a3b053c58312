"""RAM as files on a real mount: the memfd's own frames, for their owner, until they are revoked."""

from __future__ import annotations

import mmap
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import fd_links, frames, own_frames, region
from support.mounts import NOBODY, STRANGER, Attacker, add_guest, hostile, trees
from support.waiting import until

from memconsole.backend.exports.fuse import EntryKind, FuseTree, OpenAfterRevoke
from memconsole.errors import NotFound, Refused, UsageError

SIZE = 2 << 20
WORD = "contents"


@pytest.fixture
def tree() -> Iterator[FuseTree]:
    with trees() as tree:
        add_guest(tree, "web", NOBODY, NOBODY)
        yield tree


@pytest.fixture
def memfd() -> Iterator[int]:
    with region(SIZE) as fd:
        os.pwrite(fd, WORD.encode(), 0)
        yield fd


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    for parent in (directory, *directory.parents):
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & stat.S_IXOTH:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    return hostile(directory)


@pytest.fixture
def path(tree: FuseTree, memfd: int) -> Path:
    return tree.add_ram("web", "ram0", memfd, uid=NOBODY, gid=NOBODY)


@pytest.fixture
def attacker(built: Path, path: Path) -> Iterator[Attacker]:
    with Attacker(built, path) as attacker:
        yield attacker


def opened(tree: FuseTree, path: str = "guests/web/ram/ram0") -> int:
    return next(entry.open for entry in tree.list() if entry.path == path)


def mapping(pid: int, path: Path) -> tuple[int, int]:
    """Address and inode of the mapping of a path."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith(f" {path}"):
            words = line.split()
            return int(words[0].split("-")[0], 16), int(words[4])
    raise AssertionError(f"{path} is not mapped")


def test_a_mapping_has_the_memfds_frames(tree: FuseTree, memfd: int, path: Path, attacker: Attacker) -> None:
    assert attacker.do("open") == "ok"
    assert attacker.do("map") == "ok"
    assert attacker.do("load") == f"ok {WORD}"
    assert attacker.do("store") == "ok hostile!"
    assert os.pread(memfd, 8, 0) == b"hostile!"
    address, inode = mapping(attacker.pid, path)
    ours = own_frames(memfd, SIZE)
    for page in range(SIZE // 4096):
        pfn = frames(attacker.pid, address + page * 4096, 1)[0]
        assert pfn in {0, ours[page]}
    assert frames(attacker.pid, address, 1) == ours[:1] != [0]
    entry = next(entry for entry in tree.list() if entry.kind is EntryKind.RAM)
    assert entry.inode == inode == path.stat().st_ino
    assert path.stat().st_dev == tree.status().device


def test_reads_and_writes_go_to_the_memfd(memfd: int, attacker: Attacker) -> None:
    attacker.do("open")
    assert attacker.do("read") == f"ok {WORD}"
    assert attacker.do("write") == "ok"
    assert os.pread(memfd, 8, 0) == b"hostile!"
    assert attacker.do("splice") == "ok hostile!"


def test_no_way_to_change_what_is_not_its_own(tree: FuseTree, memfd: int, path: Path, attacker: Attacker) -> None:
    attacker.do("open")
    attacker.do("map")
    refused = {
        "truncate": "EPERM",
        "grow": "EPERM",
        "open-trunc": "EPERM",
        "allocate": "ENOSPC",
        "seal": "EINVAL",
        "chmod": "EPERM",
        "chown": "EPERM",
        "xattr": "EOPNOTSUPP",
        "unlink": "EACCES",
        "rename": "EACCES",
        "link": "EACCES",
        "create": "EACCES",
        "map-files": "EPERM",
        "map-exec": "EPERM",
    }
    assert {order: attacker.do(order) for order in refused} == refused
    for order in ("grow-map", "write-end"):
        assert not attacker.do(order).startswith("ok"), order
    assert [attacker.do(order) for order in ("same-size", "times", "lock", "sync")] == ["ok"] * 4
    assert attacker.do("load") == f"ok {WORD}"
    assert os.fstat(memfd).st_size == path.stat().st_size == SIZE
    assert path.stat().st_uid == NOBODY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.path for entry in tree.list() if entry.kind is EntryKind.RAM] == ["guests/web/ram/ram0"]


def test_parts_are_given_back_and_put_in_place_inside_the_file(memfd: int, path: Path, attacker: Attacker) -> None:
    os.posix_fallocate(memfd, 0, SIZE)
    assert path.stat().st_blocks * 512 == SIZE
    attacker.do("open")
    attacker.do("map")
    assert attacker.do("punch") == "ok"
    assert os.fstat(memfd).st_blocks * 512 == SIZE - 4096
    assert attacker.do("load").strip() == "ok"  # zeros
    assert attacker.do("allocate-inside") == "ok"
    assert os.fstat(memfd).st_blocks * 512 == SIZE
    assert path.stat().st_size == SIZE


def test_a_file_is_as_new_as_what_is_written_to_it_unseen(memfd: int, path: Path) -> None:
    with mmap.mmap(memfd, SIZE) as memory:
        first = path.stat().st_mtime_ns
        memory[0] = 1
        until(lambda: path.stat().st_mtime_ns > first, "a later time, once what the kernel knows has aged")


def test_memory_that_two_files_show_counts_once_and_is_used_as_far_as_it_has_frames(
    tree: FuseTree, memfd: int, path: Path
) -> None:
    tree.add_region("ram0", memfd)
    os.posix_fallocate(memfd, 0, SIZE // 2)
    space = os.statvfs(path)
    assert space.f_blocks * space.f_frsize == SIZE
    resident = os.fstat(memfd).st_blocks * 512
    assert space.f_bfree * space.f_frsize == space.f_bavail * space.f_frsize == SIZE - resident


def test_a_guest_reaches_no_other_guests_memory(tree: FuseTree, attacker: Attacker) -> None:
    with region(SIZE) as fd:
        add_guest(tree, "db", STRANGER, STRANGER)
        other = tree.add_ram("db", "ram0", fd, uid=STRANGER, gid=STRANGER, mode=0o666)
        secret = tree.add_region("ram0", fd)
        assert attacker.do(f"try {other}") == "EACCES"
        assert attacker.do(f"peek {other}") == "EACCES"
        assert attacker.do(f"try {secret}") == "EACCES"
        tree.directory("guests/db", mode=0o755)
        tree.directory("guests/db/ram", mode=0o755)
        tree.add_ram("db", "ram0", fd, uid=STRANGER, gid=STRANGER, mode=0o600)
        assert attacker.do(f"try {other}") == "EACCES"


def test_a_read_only_grant_is_read_only_even_for_root(tree: FuseTree, memfd: int, built: Path) -> None:
    path = tree.add_ram("web", "ro", memfd, uid=NOBODY, gid=NOBODY, mode=0o400)
    for uid in (NOBODY, 0):
        with Attacker(built, path, uid) as attacker:
            assert attacker.do("open") == "EACCES"
            assert attacker.do("open-ro") == "ok"
            assert attacker.do("map") == "EACCES"
            assert attacker.do("map-ro") == "ok"
            assert attacker.do("load") == f"ok {WORD}"
            assert attacker.do("make-writable") == "EACCES"
            assert attacker.do("store") == "SIGSEGV"
            assert attacker.do("self-fd") == "EACCES"
            assert attacker.do("write") == "EBADF"
    assert os.pread(memfd, 8, 0) == WORD.encode()


def test_a_revoked_file_is_opened_by_nobody(tree: FuseTree, path: Path, built: Path, attacker: Attacker) -> None:
    attacker.do("open")
    attacker.do("map")
    assert tree.revoke("guests/web/ram/ram0") == OpenAfterRevoke(open=1, cut=True)
    assert [attacker.do(order) for order in ("open", "open-ro")] == ["EACCES"] * 2
    assert [attacker.do(order) for order in ("read", "write", "self-fd")] == ["EIO"] * 3
    with Attacker(built, path, 0) as root:
        assert {root.do(order) for order in ("open", "open-ro")} == {"EACCES"}
    assert stat.S_IMODE(path.stat().st_mode) == 0
    with pytest.raises(Refused) as refused, region(SIZE) as fd:
        tree.add_ram("web", "ram0", fd)
    assert refused.value.code == "PathTaken"


def test_truncating_the_memfd_ends_every_path(tree: FuseTree, memfd: int, attacker: Attacker) -> None:
    """What a revoke leaves (files opened before, what is mapped) ends with the memfd's pages."""
    for order in ("open", "map", "fork"):
        assert attacker.do(order) == "ok"
    assert tree.revoke("guests/web/ram/ram0").open == 1
    assert attacker.do("map-again") == f"ok {WORD}"
    assert attacker.do("splice") == f"ok {WORD}"
    os.ftruncate(memfd, 0)
    assert attacker.do("load") == attacker.do("store") == attacker.do("child-load") == "SIGBUS"
    assert attacker.do("map-again") in {"SIGBUS", "ENXIO"}
    assert attacker.do("splice") == "ok"
    assert attacker.do("grow") in {"EPERM", "EIO"}
    assert attacker.do("allocate") in {"EPERM", "EIO"}
    assert attacker.do("load") == "SIGBUS"


def test_open_files_are_counted_wherever_they_are(tree: FuseTree, attacker: Attacker) -> None:
    assert opened(tree) == 0
    attacker.do("open")
    attacker.do("fork")
    assert opened(tree) == 1, "a child shares the description"
    assert attacker.do("post") == "ok"
    assert opened(tree) == 1, "a descriptor in flight is in no table of any process"
    assert tree.revoke("guests/web/ram/ram0") == OpenAfterRevoke(open=1, cut=True)
    assert attacker.do("fetch") == "ok"
    assert attacker.do("read") == "EIO"
    os.kill(attacker.pid, signal.SIGKILL)
    until(lambda: opened(tree) == 0, "its end closes the file")


def test_a_mapping_is_not_an_open_file(tree: FuseTree, attacker: Attacker) -> None:
    for order in ("open", "map", "close"):
        attacker.do(order)
    until(lambda: opened(tree) == 0, "the file is closed")
    assert attacker.do("load") == f"ok {WORD}"


def test_remove_takes_a_guest_away_and_its_name_can_be_used_again(
    tree: FuseTree, memfd: int, path: Path, attacker: Attacker
) -> None:
    attacker.do("open")
    with pytest.raises(Refused) as refused:
        tree.remove("guests/web")
    assert refused.value.code == "NotEmpty"
    assert tree.remove("guests/web", recursive=True) == OpenAfterRevoke(open=1, cut=True)
    assert attacker.do("read") == "EIO"
    assert attacker.do("open-ro") == "ENOENT"
    assert not path.exists()
    with region(SIZE) as fd:
        os.pwrite(fd, b"another!", 0)
        add_guest(tree, "web", NOBODY, NOBODY)
        tree.add_ram("web", "ram0", fd, uid=NOBODY, gid=NOBODY)
        assert attacker.do("read") == "EIO"
        assert attacker.do("open") == "ok"
        assert attacker.do("read") == "ok another!"


def test_only_a_whole_memfd_can_be_a_file(tree: FuseTree, memfd: int) -> None:
    for part in ({"offset": 4096}, {"length": SIZE - 4096}, {"offset": 4096, "length": 4096}):
        with pytest.raises(Refused) as refused:
            tree.add_ram("web", "part", memfd, **part)
        assert refused.value.code == "NotWhole"
        assert refused.value.remedy
    tree.add_ram("web", "whole", memfd, offset=0, length=SIZE)


def test_what_is_no_memory_or_no_path_is_refused(tree: FuseTree, memfd: int) -> None:
    for bad in ("", "/", "guests//x", "guests/../x", ".", "guests/web/", "a" * 256):
        with pytest.raises(UsageError):
            tree.directory(bad)
    with pytest.raises(NotFound):
        tree.directory("nobody/here")
    with pytest.raises(NotFound):
        tree.revoke("guests/none")
    with pytest.raises(Refused):
        tree.link("guests/web", Path("/x"))
    empty = os.memfd_create("empty")
    try:
        with pytest.raises(Exception, match="refused"):
            tree.add_ram("web", "empty", empty)
    finally:
        os.close(empty)
    assert not [entry for entry in tree.list() if entry.kind is EntryKind.RAM]


def test_owner_and_mode_can_be_given_to_another(tree: FuseTree, memfd: int, path: Path, attacker: Attacker) -> None:
    assert attacker.do("open") == "ok"
    tree.add_ram("web", "ram0", memfd, uid=STRANGER, gid=STRANGER)
    assert path.stat().st_uid == STRANGER
    assert attacker.do("open") == "EACCES"
    tree.add_ram("web", "ram0", memfd, uid=NOBODY, gid=NOBODY)
    assert attacker.do("open") == "ok"


def test_the_revoked_memory_is_not_kept_by_the_server(tree: FuseTree, attacker: Attacker) -> None:
    """No fd of the server's holds a revoked file's memfd, so that its owner can prove that nobody does."""

    def held() -> list[str]:
        return [said for said in fd_links(tree.pid).values() if "memfd:" in said]

    assert len(held()) == 1  # which is asked for its blocks, and emptied in parts
    tree.revoke("guests/web/ram/ram0")
    assert held() == []


def test_a_thousand_opens_leave_nothing(tree: FuseTree, path: Path) -> None:
    process = Path(f"/proc/{tree.pid}")

    def held() -> tuple[int, int]:
        return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))

    tree.set_status("web", b"{}")
    before = held()
    for _ in range(1000):
        os.close(os.open(path, os.O_RDWR))
        assert (tree.mountpoint / "guests/web/status").read_bytes() == b"{}"
    assert held() == before
    until(lambda: tree.status().handles == 0, "every file is released")
