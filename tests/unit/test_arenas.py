"""Arenas by values: what a kernel shows of its ranges, what is in one, which words it needs, what is refused."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from support.desks import desks
from support.trees import Tree

from memconsole.actions import ArenaCreate, ArenaRemove, ArenaScan, Reserve
from memconsole.backend.diagnose import arenas as looked
from memconsole.backend.kernel import mounts, pmem
from memconsole.backend.kernel.mounts import MountInfo
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import ext4
from memconsole.backend.stores.arena import Contents
from memconsole.backend.stores.dax import DaxStore
from memconsole.backend.stores.noted import word_of
from memconsole.backend.verbs import arenas as verbs
from memconsole.backend.verbs import regions
from memconsole.errors import BadFile
from memconsole.model import Access, Grant, GrantState, Severity

M, G = 1 << 20, 1 << 30


def with_pmem(tree: Tree, name: str = "pmem0", *, size: int = 256 * M, start: int = G) -> Pmem:
    """A range of memmap=, as sysfs shows it."""
    base = f"/sys/class/block/{name}"
    tree.write(f"{base}/size", f"{size // 512}\n")
    tree.write(f"{base}/dev", "259:0\n")
    tree.link(f"{base}/device", "../../devices/platform/e820_pmem/ndbus0/region0/namespace0.0")
    tree.write("/sys/class/devices/platform/e820_pmem/ndbus0/region0/namespace0.0/resource", f"{start:#x}\n")
    return pmem.devices(tree.root)[0]


def device(tmp_path: Path, head: bytes = b"", size: int = 64 * M) -> Pmem:
    """A file in the place of a range."""
    path = tmp_path / "range"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return Pmem(f"..{path}", size, G, "namespace0.0", os.makedev(259, 0))


def superblock(label: bytes, state: int = 1, incompatible: int = 0, blocks: int = 0) -> bytes:
    block = bytearray(1024)
    struct.pack_into("<I", block, 0x04, blocks & 0xFFFFFFFF)
    struct.pack_into("<I", block, 0x18, 2)
    struct.pack_into("<I", block, 0x150, blocks >> 32)
    struct.pack_into("<HH", block, 0x38, 0xEF53, state)
    struct.pack_into("<I", block, 0x60, incompatible)
    block[0x78 : 0x78 + len(label)] = label
    return bytes(1024) + block


def test_a_range_is_read_with_its_place(tmp_path: Path) -> None:
    found = with_pmem(Tree(tmp_path))
    assert found == Pmem("pmem0", 256 * M, G, "namespace0.0", os.makedev(259, 0), -1)
    assert found.path == "/dev/pmem0"


def test_a_kernel_without_block_devices_has_no_range(tmp_path: Path) -> None:
    assert pmem.devices(tmp_path) == ()


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    with_pmem(tree)
    tree.write("/sys/class/block/pmem0/dev", "none\n")
    with pytest.raises(BadFile, match="pmem0/dev"):
        pmem.devices(tree.root)
    gaps: list[object] = []
    assert pmem.devices(tree.root, gaps) == ()  # type: ignore[arg-type]
    assert len(gaps) == 1


@pytest.mark.parametrize(
    ("head", "holds"),
    [
        (b"", Contents()),
        (superblock(b"mc:lab"), Contents("lab")),
        (superblock(b"home"), Contents(other="an ext4 file system home")),
        (bytes(4096) + b"NVDIMM_DAX_INFO\0", Contents(other="a devdax namespace")),
        (b"somebody's", Contents(other="bytes that nothing describes")),
    ],
)
def test_what_a_range_holds_is_told_by_its_marks(tmp_path: Path, head: bytes, holds: Contents) -> None:
    assert arenas.contents(device(tmp_path, head)) == holds


@pytest.mark.parametrize("size", [32 * M, 1 << 50])
def test_an_arena_says_how_large_it_was_made(tmp_path: Path, size: int) -> None:
    head = superblock(b"mc:lab", incompatible=0x80, blocks=size // 4096)
    assert arenas.contents(device(tmp_path, head)).size == size


def test_a_range_that_became_larger_than_its_arena_is_told(tmp_path: Path) -> None:
    held = device(tmp_path, superblock(b"mc:lab", blocks=32 * M // 4096))
    tree = Tree(tmp_path / "tree")
    tree.write("/proc/cmdline", "quiet\n")
    found = looked._range(held, None, tree.root)
    assert found.unused == 32 * M
    assert any("32M of it are not used" in line for line in looked.lines(found))


@pytest.mark.parametrize(
    ("state", "incompatible", "said", "mounted"),
    [
        (1, 0, [], True),
        (1, 4, [("arena-replayed", Severity.INFO)], True),
        (3, 4, [("arena-unread", Severity.ERROR)], False),
    ],
)
def test_an_arena_says_how_the_kernel_before_left_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: int,
    incompatible: int,
    said: list[tuple[str, Severity]],
    mounted: bool,
) -> None:
    held = device(tmp_path, superblock(b"mc:lab", state, incompatible))
    seen: list[str] = []
    monkeypatch.setattr(pmem, "devices", lambda *_: (held,))

    def mount(_device: Pmem, name: str, _runtime: Path) -> Path:
        seen.append(name)
        return tmp_path

    arenas.directory(tmp_path).mkdir()
    monkeypatch.setattr(arenas, "_mount", mount)
    monkeypatch.setattr(arenas, "read_record", lambda *_: arenas.ArenaRecord(name="lab"))
    found = arenas.mount_all(tmp_path)
    assert [(each.id, each.severity) for each in found] == said
    assert (seen == ["lab"]) is mounted


@pytest.mark.parametrize(("mark", "said"), [("", []), (".replayed-lab", ["arena-replayed"])])
def test_a_journal_that_memconsole_resume_had_replayed_is_told_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, said: list[str]
) -> None:
    held = device(tmp_path, superblock(b"mc:lab", 1, 4))  # as it is of any that is mounted
    arenas.directory(tmp_path).mkdir()
    if mark:
        (arenas.directory(tmp_path) / mark).touch()
    there = MountInfo(held.number, "/", Path("/run/memconsole/arenas/lab"), "ext4", held.path)
    monkeypatch.setattr(pmem, "devices", lambda *_: (held,))
    monkeypatch.setattr(mounts, "mounts", lambda *_: (there,))
    assert [each.id for each in arenas.mount_all(tmp_path)] == said


def test_bytes_at_the_end_of_a_range_are_seen(tmp_path: Path) -> None:
    held = device(tmp_path)
    with Path(held.path).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"labels")
    assert arenas.contents(held) == Contents(other="bytes that nothing describes")


@pytest.mark.parametrize(
    ("name", "head", "size", "codes"),
    [
        ("lab", b"", 64 * M, []),
        ("lab", superblock(b"mc:old"), 64 * M, ["HoldsArena"]),
        ("lab", superblock(b"home"), 64 * M, ["HoldsUnknown"]),
        ("lab", b"", 32 * M, ["TooSmall"]),
        ("a-name-that-is-long", b"", 64 * M, ["BadName"]),
        ("../x", b"", 64 * M, ["BadName"]),
    ],
)
def test_only_an_empty_range_becomes_an_arena(
    tmp_path: Path, name: str, head: bytes, size: int, codes: list[str]
) -> None:
    refused = list(arenas.create_refusals(name, device(tmp_path, head, size)))
    assert [code for code, *_ in refused] == codes
    assert all(remedy for *_, remedy in refused)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("quiet memmap=256M!1G kho=off", "memmap=256M!1G"),
        ("memmap=64M$5G,0x10000000!0x40000000", "memmap=0x10000000!0x40000000"),
        ("memmap=256M!2G", ""),
        ("memmap=many!1G memmap=exactmap", ""),
        ("", ""),
    ],
)
def test_the_word_that_sets_a_range_aside_is_found(tmp_path: Path, line: str, words: str) -> None:
    tree = Tree(tmp_path)
    tree.write("/proc/cmdline", line + "\n")
    assert word_of(with_pmem(tree).start, tree.root) == words


def test_words_are_proposed_that_fit_the_host(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write("/proc/iomem", "00001000-0009ffff : System RAM\n100000000-8ffffffff : System RAM\n")
    assert "memmap=8G!0x700000000" in arenas.words(tree.root)
    assert "memmap=SIZE!START" in arenas.words(tmp_path / "nothing")


def test_neighbours_of_a_map_of_extents_are_one_run() -> None:
    first, second, apart = ext4.Run(0, M, M), ext4.Run(M, 2 * M, M), ext4.Run(2 * M, 9 * M, M)
    assert ext4._joined([first], second) == [ext4.Run(0, M, 2 * M)]
    assert ext4._joined([first], apart) == [first, apart]


@pytest.mark.parametrize(
    ("size", "page", "node", "codes"),
    [
        (32 * M, 4096, None, ["NoService"]),
        (M, 4096, None, ["BadSize", "NoService"]),
        (0, 4096, 0, ["BadPageSize", "BadSize", "NoService"]),
        (1 << 40, 4096, None, ["BadSize", "NoService"]),
    ],
)
def test_what_keeps_nothing_reserves_nothing_on_an_arena(
    tmp_path: Path, size: int, page: int, node: int | None, codes: list[str]
) -> None:
    store = DaxStore(tmp_path, lasting=False)
    found = store.reserve_refusals(size, page, node, promised=0, root="/")
    assert [each.code for each in found] == codes
    assert all(each.remedy for each in found)
    assert store.found(()) == ([], [])
    assert not store.may_know()


def test_what_only_a_memfd_can_do_is_refused_by_name(tmp_path: Path) -> None:
    grant = Grant("g1", "web", "db", 0, 2 * M, Access.RW, GrantState.OFFERED, dma="0000:00:04.0", lazy=True)
    found = DaxStore(tmp_path, lasting=True).grant_refusals(grant)
    assert [each.code for each in found] == ["NotLazy", "NoDma"]


def test_verbs_of_arenas_are_refused_where_nothing_is_kept(tmp_path: Path) -> None:
    with desks(tmp_path) as desk:
        with_pmem(desk.tree)
        for work in (
            verbs.create(desk, ArenaCreate("lab")),
            verbs.scan(desk, ArenaScan()),
            verbs.remove(desk, ArenaRemove("lab")),
        ):
            assert "NoService" in [each.code for each in work.refusals]
            assert not work.steps
        found = regions.reserve(desk, Reserve("new", 4 * M, store="dax")).refusals
        assert [each.code for each in found] == ["NoService"]


def test_a_host_without_a_range_is_told_which_words_set_one_aside(tmp_path: Path) -> None:
    with desks(tmp_path) as desk:
        refused = verbs.create(desk, ArenaCreate("lab")).refusals
        assert {"NoService", "NoRange"} == {each.code for each in refused}
        assert any("memmap=" in each.remedy for each in refused)
