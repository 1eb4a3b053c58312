"""How an arena handles its files, on an ext4 of a loop device: that is not dax, and has no physical address.

What only dax has (frames, 2 MiB mappings, pins that hold a truncate up) is seen in tests/vm/test_arena.py.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.arenas import at, empty, images
from support.arenas import files as files_at
from support.mounts import add_guest, trees

from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import dax, ext4, files, memfd
from memconsole.backend.stores.arena import FRESH, Arena, ArenaRecord, RegionRecord
from memconsole.backend.stores.dax import DaxStore
from memconsole.errors import BadFile, KernelRefused, Refused
from memconsole.model import Access, Grant, GrantState, Region, RegionState

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a file system")
M = 1 << 20
SIZE = 8 * M


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An arena's file system, mounted."""
    with images(tmp_path_factory.mktemp("arena"), "host") as path:
        yield path


@pytest.fixture
def arena(image: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """The arena as the kernel's list of mounts has it, taken as if it were dax."""
    (found,) = (each for each in arenas.mounted() if each.path == image)
    assert found.trouble == "it is mounted without dax"
    monkeypatch.setattr(arenas, "mounted", lambda *_: (at(image),))
    monkeypatch.setattr(arenas, "mount_all", lambda *_: [])
    yield at(image)
    empty(image)


@pytest.fixture
def store(arena: Arena, tmp_path: Path) -> Iterator[DaxStore]:
    made = DaxStore(tmp_path, lasting=True)
    yield made
    made.close()


def region(name: str = "web", size: int = SIZE) -> Region:
    return Region(name, "dax", size, 4096, RegionState.RESERVED)


def reserved(store: DaxStore, name: str = "web", size: int = SIZE) -> int:
    (fd,) = store.reserve_segments(name, size, 4096, None, prefault=False, promised=0)
    store.describe([fd], region(name, size))
    return fd


def test_a_region_is_one_aligned_run_of_zeroes_that_says_what_it_is(store: DaxStore, arena: Arena) -> None:
    fd = reserved(store)
    (run,) = ext4.runs(fd, SIZE)
    assert (run.logical, run.length, run.physical % (2 * M)) == (0, SIZE, 0)
    assert os.pread(fd, SIZE, 0) == bytes(SIZE)
    assert arenas.read_record(arena.path / "web", RegionRecord) == RegionRecord(region=region())
    os.close(fd)


@pytest.mark.parametrize(
    "size", [64 * M, 256 * M, 488 * M, 512 * M, 1 << 30, 2 << 30], ids=lambda size: f"{size // M}M"
)
def test_a_large_region_is_one_run_too(tmp_path: Path, size: int) -> None:
    """Of which ext4 keeps a list in a cluster, that is not to lie in the middle of it."""
    with images(tmp_path, "large", size=6 << 30) as place:
        for turn in ("first", "second"):
            fd = os.open(place / turn, os.O_RDWR | os.O_CREAT, 0o600)
            ext4.allocate(fd, size)
            (run,) = ext4.runs(fd, size)
            assert (run.logical, run.length, run.physical % (2 * M)) == (0, size, 0)
            assert os.fstat(fd).st_size == size
            assert os.fstat(fd).st_blocks * 512 - size in {0, 2 * M}
            os.close(fd)


def test_an_arena_that_was_not_unmounted_says_that_its_journal_replays(store: DaxStore, arena: Arena) -> None:
    os.close(reserved(store))
    with Path(arena.source).open("rb") as device:
        found = ext4.superblock(device.read(4096))
    assert found is not None
    assert (found.label, found.replays, found.errors, found.size) == ("mc:host", True, False, 96 * M)


def test_what_is_written_down_of_a_grant_is_found_again(store: DaxStore, arena: Arena) -> None:
    fd = reserved(store)
    grant = Grant("g1", "web", "db", 0, SIZE, Access.RW, GrantState.MAPPED)
    store.describe([fd], region(), [grant])
    (found,), told = store.found(())
    assert (found.region.name, found.region.segments, told) == ("web", files.segments([fd]), [])
    record = arenas.read_record(arena.path / "web", RegionRecord)
    assert record is not None
    assert record.grants == (grant,)
    assert store.found({"web"}) == ([], [])
    for each in (fd, *found.fds):
        os.close(each)


def test_what_was_never_finished_is_thrown_away(store: DaxStore, arena: Arena) -> None:
    (half,) = store.reserve_segments("half", SIZE, 4096, None, prefault=False, promised=0)
    os.close(half)
    fd = reserved(store)
    copy = store.fresh_segment("web", 0, SIZE, 4096, None)
    os.close(copy)
    (found,), told = store.found(())
    assert (found.region.name, told) == ("web", [])
    assert sorted(path.name for path in arena.path.iterdir() if path.is_file()) == ["web"]
    for each in (fd, *found.fds):
        os.close(each)


def test_a_move_counts_from_the_moment_when_the_names_change(store: DaxStore, arena: Arena) -> None:
    old = reserved(store)
    fresh = store.fresh_segment("web", 0, SIZE, 4096, None)
    os.pwrite(fresh, b"moved", 0)
    store.settle("web", 0, fresh, old)
    store.settle("web", 0, fresh, old)  # as by a control process that carries it through
    assert (arena.path / "web").stat().st_ino == os.fstat(fresh).st_ino
    record = arenas.read_record(arena.path / "web", RegionRecord)
    assert record is not None
    assert record.generation == 2
    store.settle("web", 0, old, fresh)
    assert (arena.path / "web").stat().st_ino == os.fstat(old).st_ino
    store.drop_fresh("web", 0)
    assert not (arena.path / (FRESH + "web")).exists()
    os.close(old)
    os.close(fresh)


def test_a_region_of_another_store_takes_its_name_and_gives_it_up(store: DaxStore, arena: Arena) -> None:
    (elsewhere,) = memfd.reserve_segments("web", SIZE)
    fresh = store.fresh_segment("web", 0, SIZE, 4096, None)
    store.describe([fresh], region())
    for _ in range(2):  # the second time as by a control process that carries it through
        store.settle("web", 0, fresh, elsewhere)
        assert files_at(arena.path) == ["web"]
    for _ in range(2):
        store.settle("web", 0, elsewhere, fresh)
        assert files_at(arena.path) == [FRESH + "web"]
    taken = reserved(store)
    with pytest.raises(KernelRefused, match="cannot become web"):
        store.settle("web", 0, fresh, elsewhere)
    assert os.fstat(taken).st_ino == (arena.path / "web").stat().st_ino, "a name that somebody has is left to him"
    for fd in (elsewhere, fresh, taken):
        os.close(fd)


def test_a_file_that_was_cut_never_grows_again(store: DaxStore) -> None:
    fd = reserved(store)
    guest = store.segment_fd(fd, Access.RW)
    mapped = mmap.mmap(guest, SIZE)
    store.empty_segments([fd])
    store.discard("web")
    for act in (
        lambda: os.ftruncate(guest, SIZE),
        lambda: os.pwrite(guest, b"x", 0),
        lambda: os.posix_fallocate(guest, 0, SIZE),
    ):
        with pytest.raises(PermissionError):
            act()
    assert os.fstat(guest).st_size == 0
    mapped.close()
    os.close(guest)
    os.close(fd)


def test_a_cut_that_does_not_end_is_given_up(store: DaxStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = tmp_path / "truncate"
    stuck.write_text("#!/bin/sh\nexec sleep 600\n")
    stuck.chmod(0o755)
    fd = reserved(store)
    with monkeypatch.context() as at_work:
        at_work.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(KernelRefused, match="is still pinned after"):
            dax.cut(fd, within=0.1)
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)


def test_a_full_arena_is_refused_by_name_and_nothing_is_left(store: DaxStore, arena: Arena) -> None:
    (refusal,) = store.reserve_refusals(1 << 30, 4096, None, promised=0, root="/")
    assert refusal.code == "NoMemory"
    with pytest.raises(KernelRefused):
        dax.create_file(arena, "large", 1 << 30)
    assert not (arena.path / "large").exists()


def test_a_record_of_a_newer_memconsole_is_left_as_it_is(store: DaxStore, arena: Arena) -> None:
    fd = reserved(store)
    arenas.write_record(fd, RegionRecord(region=region(), format=arenas.FORMAT + 1))
    with pytest.raises(BadFile, match="newer memconsole"):
        arenas.read_record(fd, RegionRecord)
    found, (told,) = store.found(())
    assert (found, told.id, told.subject) == ([], "arena-file", "web")
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)


def test_an_arena_of_a_newer_memconsole_is_left_alone(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(image, os.O_RDONLY)
    before = os.getxattr(fd, arenas.XATTR)
    try:
        arenas.write_record(fd, ArenaRecord(name="host", format=arenas.FORMAT + 1))
        (found,) = (each for each in arenas.mounted() if each.path == image)
        assert "newer memconsole" in found.trouble
        monkeypatch.setattr(arenas, "mounted", lambda *_: (found,))
        monkeypatch.setattr(arenas, "mount_all", lambda *_: [])
        store = DaxStore(tmp_path, lasting=True)
        regions, (told,) = store.found(())
        assert (regions, told.id) == ([], "arena-unused")
        (refusal,) = store.reserve_refusals(SIZE, 4096, None, promised=0, root="/")
        assert (refusal.code, "newer memconsole" in refusal.why) == ("NoArena", True)
        assert b'"format":2' in os.getxattr(fd, arenas.XATTR), "and what it says stays"
    finally:
        os.setxattr(fd, arenas.XATTR, before)
        os.close(fd)


def test_a_second_memconsole_leaves_an_arena_alone(store: DaxStore, tmp_path: Path) -> None:
    os.close(reserved(store))
    other = DaxStore(tmp_path, lasting=True)
    found, (told,) = other.found(())
    assert (found, told.id) == ([], "arena-unused")
    assert "another control process uses it" in told.observed
    assert [each.code for each in other.reserve_refusals(SIZE, 4096, None, promised=0, root="/")] == ["NoArena"]
    store.close()
    (taken,), _ = other.found(())
    os.close(taken.fds[0])
    other.close()


def test_a_file_of_the_mount_is_as_large_as_its_region_whatever_is_written(store: DaxStore) -> None:
    fd = reserved(store)
    with trees() as tree:
        add_guest(tree, "web", 0, 0)
        try:
            path = tree.add_ram("web", "web", fd)
        except Refused as error:
            pytest.skip(str(error))
        file = os.open(path, os.O_RDWR)
        with mmap.mmap(file, SIZE) as mapped:
            mapped[:4] = b"mine"
            assert os.pread(file, 4, 0) == os.pread(fd, 4, 0) == b"mine"
            assert os.pwrite(file, b"written", SIZE - 4) == 4
            assert mapped[-4:] == b"writ"
        assert os.pread(file, 9, SIZE - 4) == b"writ"
        assert os.pread(file, 9, SIZE + M) == b""
        for act in (lambda: os.pwrite(file, b"x", SIZE), lambda: os.ftruncate(file, 2 * SIZE)):
            with pytest.raises(OSError, match=r"File too large|not permitted"):
                act()
        assert os.fstat(fd).st_size == SIZE
        os.close(file)
    os.close(fd)
