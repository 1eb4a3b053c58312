"""Regions as pieces of a device: made, described, found again, refused; a file stands for the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from support.desks import Desk, desks, grant, guest
from support.pieces import SIZE, G, Host, M, hosts, region, reserve, with_store
from support.trees import Tree

from memconsole.actions import ArenaCreate, GuestStart
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.observe.mappings import region_mappings
from memconsole.backend.stores import described, namespaces, ranges
from memconsole.backend.stores.arena import Contents
from memconsole.backend.stores.described import COPY, HEAD, UNIT
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.verbs import arenas as verbs
from memconsole.backend.verbs import grants as grant_verbs
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.extents import Flag
from memconsole.model import Access, Grant, GrantState, GuestKind, Segment


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with hosts(tmp_path) as made:
        yield made


@pytest.fixture
def store(host: Host) -> PieceStore:
    return host.lab()


def codes(store: PieceStore, size: int = 2 * UNIT, page: int = 4096, node: int | None = None) -> list[str]:
    return [each.code for each in store.reserve_refusals(size, page, node, promised=0, root="/")]


def test_a_region_is_a_run_of_its_own_all_zeroes(host: Host, store: PieceStore) -> None:
    host.spoil(UNIT, os.urandom(4096))
    first, second = reserve(store, "web"), reserve(store, "db", UNIT)
    assert [each.start for each in store.segments([first, second])] == [UNIT, 3 * UNIT]
    assert [each.size for each in store.segments([first, second])] == [2 * UNIT, UNIT]
    assert not any(host.raw(UNIT, 4096))
    with store.frames(second, UNIT) as table:
        (row,) = list(table)
    assert (row.pfn, row.count) == ((G + 3 * UNIT) // 4096, 512)
    assert row.flags & Flag.HUGE
    os.close(first)
    os.close(second)


def test_the_next_control_process_finds_regions_by_the_device_alone(host: Host, store: PieceStore) -> None:
    fd = reserve(store, "web")
    given = Grant("g1", "web", "db", 0, 2 * UNIT, Access.RW, GrantState.MAPPED)
    store.describe([fd], region("web"), [given])
    host.spoil(UNIT + 5, b"kept")
    os.close(fd)
    store.close()
    later = host.store()
    assert later.may_know()
    (found,), told = later.found(())
    assert not told
    assert msgspec.structs.replace(found.region, segments=()) == region("web")
    assert found.region.segments[0].start == UNIT
    assert later.arenas()[0].said.piece("web") is not None
    assert later.arenas()[0].said.pieces[0].grants == (given,)
    assert os.pread(found.fds[0], 4, UNIT + 5) == b"kept"
    os.close(found.fds[0])
    assert later.found({"web"}) == ([], [])


def test_what_was_never_finished_is_forgotten(host: Host, store: PieceStore) -> None:
    os.close(reserve(store, "half", described_too=False))
    store.close()
    later = host.store()
    assert later.found(()) == ([], [])
    assert later.arenas()[0].said.pieces == ()
    assert later.arenas()[0].free == (SIZE - UNIT, SIZE - UNIT)


def test_two_control_processes_do_not_use_one_device(host: Host, store: PieceStore) -> None:
    os.close(reserve(store, "web"))
    other = host.store()
    regions, (finding,) = other.found(())
    assert not regions
    assert (finding.id, finding.subject) == ("arena-unused", "dax0.0")
    assert "another control process" in finding.evidence
    assert codes(other) == ["NoArena"]
    store.close()
    assert codes(other) == []


@pytest.mark.parametrize(
    ("size", "page", "node", "expected"),
    [
        (UNIT, 4096, None, []),
        (M, 4096, None, ["BadSize"]),
        (0, 4096, 0, ["BadPageSize", "BadSize"]),
        (UNIT, UNIT, None, ["BadPageSize"]),
        (SIZE, 4096, None, ["NoMemory"]),
    ],
)
def test_what_cannot_be_reserved_is_refused_by_name(
    store: PieceStore, size: int, page: int, node: int | None, expected: list[str]
) -> None:
    assert codes(store, size, page, node) == expected
    assert all(each.remedy for each in store.reserve_refusals(size, page, node, promised=0, root="/"))


def test_a_device_that_is_full_says_what_it_has_left(host: Host, store: PieceStore) -> None:
    os.close(reserve(store, "most", SIZE - 3 * UNIT))
    os.close(reserve(store, "a", UNIT))
    os.close(reserve(store, "b", UNIT))
    (refusal,) = store.reserve_refusals(UNIT, 4096, None, promised=0, root="/")
    assert refusal.code == "NoMemory"
    store.discard("a")
    assert codes(store, UNIT) == []
    with pytest.raises(Refused, match="cannot reserve"):
        reserve(store, "c", 2 * UNIT)


def test_released_memory_is_zeroed_before_another_has_it(host: Host, store: PieceStore) -> None:
    fd = reserve(store, "web")
    host.spoil(UNIT, b"secret")
    assert store.wipe_segments([fd]) == 2 * UNIT
    os.close(fd)
    store.discard("web")
    assert not (host.nodes / "lab" / "web").exists()
    host.spoil(UNIT, b"secret")  # what somebody wrote who had it still
    os.close(reserve(store, "new"))
    assert not any(host.raw(UNIT, 4096))


def test_nothing_is_reserved_that_there_is_no_room_to_describe(
    store: PieceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.close(reserve(store, "web"))
    before = store.arenas()[0].said
    monkeypatch.setattr(described, "COPY", HEAD.size + len(msgspec.json.encode(before)))
    with pytest.raises(BadFile, match="no room for another region"):
        reserve(store, "more")
    assert store.arenas()[0].said == before


def test_a_copy_is_what_a_region_holds(host: Host, store: PieceStore) -> None:
    host.tree.meminfo()
    fd = reserve(store, "web")
    host.spoil(2 * UNIT, b"second unit")
    copy = store.readable_fd(fd)
    assert os.pread(copy, 11, UNIT) == b"second unit"
    assert os.fstat(copy).st_size == 2 * UNIT
    assert os.fstat(copy).st_blocks * 512 < UNIT
    os.close(copy)
    os.close(fd)


def test_a_region_that_goes_to_another_store_leaves_zeros_and_no_name(host: Host, store: PieceStore) -> None:
    fd = reserve(store, "web")
    elsewhere = os.memfd_create("memconsole:web:0")
    host.spoil(UNIT, b"secret")
    store.empty_segments([fd])
    assert host.raw(UNIT, 6) == b"secret", "one that is there is not zeroed by the way"
    store.settle("web", 0, elsewhere, fd)
    assert store.arenas()[0].said.pieces[0].region is None
    store.settle("web", 0, fd, elsewhere)
    assert store.arenas()[0].said.pieces[0].region == region("web"), "it came back"
    store.drop_fresh("web", 0)
    assert store.arenas()[0].said.pieces[0].region == region("web"), "and is not given up"
    store.settle("web", 0, elsewhere, fd)
    store.empty_segments([fd])
    assert not any(host.raw(UNIT, 2 * UNIT))
    store.drop_fresh("web", 0)
    assert store.arenas()[0].said.pieces == ()
    os.close(fd)
    os.close(elsewhere)


def test_contents_never_come_to_another_place_of_it(store: PieceStore) -> None:
    fd = reserve(store, "web")
    assert "descriptor" in store.why_no_copy(fd, region("web"), 0, promised=0, root="/")
    with pytest.raises(Refused, match="cannot be moved"):
        store.fresh_segment("web", 0, 2 * UNIT, 4096, None)
    os.close(fd)


def test_what_a_device_cannot_do_is_refused_by_name(store: PieceStore) -> None:
    asked = Grant("g1", "web", "db", 0, UNIT, Access.RW, GrantState.OFFERED, dma="0000:00:04.0", lazy=True)
    assert [each.code for each in store.grant_refusals(asked)] == ["NotLazy", "NoDma"]


def test_a_file_that_is_of_no_region_has_no_place(host: Host, store: PieceStore) -> None:
    with Path(host.device.path).open("r+b") as file:
        assert store.segments([file.fileno()])[0].size == 0
        fd = file.fileno()
        for ask in (
            lambda: store.frames(fd, UNIT),
            lambda: store.readable_fd(fd),
            lambda: store.segment_fd(fd, Access.RW),  # it would be handed out with another region's place
            lambda: store.wipe_segments([fd]),
        ):
            with pytest.raises(NotFound, match="no range that this service uses describes it"):
                ask()


def test_what_keeps_nothing_takes_nothing(host: Host, store: PieceStore) -> None:
    store.close()
    brief = host.store(lasting=False)
    assert codes(brief) == ["NoService"]
    assert brief.found(()) == ([], [])
    assert not brief.may_know()


def test_a_device_of_another_host_is_left_alone(host: Host, store: PieceStore) -> None:
    os.close(reserve(store, "web"))
    store.close()
    host.tree.write("/etc/machine-id", "another\n")
    regions, (finding,) = host.store().found(())
    assert not regions
    assert "machine id abc" in finding.evidence


def test_a_device_of_a_newer_memconsole_is_left_alone(host: Host, store: PieceStore) -> None:
    store.close()
    head = HEAD.pack(described.MAGIC, described.FORMAT + 1, 0, 99, 2, SIZE, bytes(32))[: HEAD.size - 32]
    host.spoil(0, head + described._digest(head, b"{}") + b"{}")
    before = host.raw(0, UNIT)
    later = host.store()
    regions, (finding,) = later.found(())
    assert not regions
    assert "newer memconsole" in finding.observed
    assert codes(later) == ["NoArena"]
    assert ranges.contents(host.device).other.startswith("a description of memconsole that cannot be used")
    assert host.raw(0, UNIT) == before


@pytest.mark.parametrize(
    ("at", "raw", "holds"),
    [
        (0, b"", Contents()),
        (0, b"somebody's", Contents(other="bytes that nothing describes")),
        (SIZE - 100, b"labels", Contents(other="bytes that nothing describes")),
        (1024 + 0x38, b"\x53\xef", Contents(other="an ext4 file system")),
        (0, described.MAGIC + b"half of a first description", Contents()),
    ],
)
def test_what_a_device_holds_is_told_by_its_bytes(host: Host, at: int, raw: bytes, holds: Contents) -> None:
    host.spoil(at, raw)
    assert ranges.contents(host.device) == holds


def test_an_arena_and_a_damaged_one_are_told(host: Host, store: PieceStore) -> None:
    assert ranges.contents(host.device) == Contents("lab")
    for copy in (0, COPY):
        host.spoil(copy + HEAD.size, b"?")
    assert "neither copy" in ranges.contents(host.device).other


def test_an_arena_that_is_removed_holds_nothing(host: Host, store: PieceStore) -> None:
    host.spoil(5 * UNIT, b"left")
    store.remove(store.arenas()[0])
    assert ranges.contents(host.device) == Contents()
    assert store.arenas() == ()


# --- the kernel's side ------------------------------------------------------------------------------------------


def with_devdax(tree: Tree, driver: str = "device_dax", align: int = UNIT, start: int = G + UNIT) -> None:
    base = "/sys/bus/dax/devices/dax0.0"
    tree.write(f"{base}/size", f"{SIZE}\n")
    tree.write(f"{base}/align", f"{align}\n")
    tree.write(f"{base}/resource", f"{start:#x}\n")
    tree.write(f"{base}/dev", "252:0\n")
    tree.link(f"{base}/driver", f"../../../bus/dax/drivers/{driver}")


@pytest.mark.parametrize(
    ("driver", "align", "trouble"),
    [("device_dax", UNIT, ""), ("kmem", UNIT, "its driver is kmem"), ("device_dax", 4096, "in pages of 4096 bytes")],
)
def test_only_a_device_that_is_mapped_by_2m_is_used(tmp_path: Path, driver: str, align: int, trouble: str) -> None:
    tree = Tree(tmp_path)
    assert ranges.devdax(tmp_path) == ()
    with_devdax(tree, driver, align)
    (found,) = ranges.devdax(tmp_path)
    assert (found.name, found.size, found.start, found.number) == ("dax0.0", SIZE, G + UNIT, os.makedev(252, 0))
    assert trouble in found.trouble
    assert bool(found.trouble) == bool(trouble)


def with_namespace(tree: Tree) -> Pmem:
    home = "/sys/devices/platform/e820_pmem/ndbus0/region0"
    tree.write(f"{home}/namespace0.0/resource", f"{G:#x}\n")
    tree.write(f"{home}/dax_seed", "dax0.7\n")
    tree.link("/sys/bus/nd/devices/region0", f"{tree.root}{home}")
    tree.link("/sys/bus/nd/devices/namespace0.0", f"{tree.root}{home}/namespace0.0")
    for name in ("nd_pmem/bind", "nd_pmem/unbind", "dax_pmem/bind"):
        tree.write(f"/sys/bus/nd/drivers/{name}", "")
    tree.directory("/sys/bus/nd/devices/dax0.7")
    return Pmem("pmem0", SIZE + UNIT, G, "namespace0.0", os.makedev(259, 0))


def test_a_range_becomes_a_devdax_device_by_sysfs_alone(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    device = with_namespace(tree)
    with_devdax(tree)
    assert namespaces.as_devdax(device, tmp_path).name == "dax0.0"
    seed = tmp_path / "sys/bus/nd/devices/dax0.7"
    written = {path.name: path.read_text() for path in seed.iterdir()}
    assert written.pop("uuid")
    assert written == {"align": str(UNIT), "mode": "ram", "namespace": "namespace0.0"}
    assert (tmp_path / "sys/bus/nd/drivers/dax_pmem/bind").read_text() == "dax0.7"


def test_a_range_that_does_not_become_one_is_a_block_device_again(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    device = with_namespace(tree)
    with pytest.raises(NotFound, match="did not become"):
        namespaces.as_devdax(device, tmp_path)
    assert (tmp_path / "sys/bus/nd/drivers/nd_pmem/bind").read_text() == "namespace0.0"
    (tmp_path / "sys/bus/nd/devices/dax0.7").rename(tmp_path / "elsewhere")
    with pytest.raises(KernelRefused, match=r"dax0\.7/align does not take"):
        namespaces.as_devdax(device, tmp_path)


def test_no_other_namespace_is_touched(tmp_path: Path) -> None:
    device = Pmem("pmem0", SIZE, G, "../../etc", os.makedev(259, 0))
    with pytest.raises(NotFound, match="cannot become a devdax device"):
        namespaces.as_devdax(device, tmp_path)


def test_a_mapping_reaches_the_regions_whose_part_of_the_device_it_is_of() -> None:
    whole = os.makedev(252, 0)
    one = msgspec.structs.replace(region("web"), segments=(Segment(11, 6, 2 * UNIT, UNIT, whole),))
    two = msgspec.structs.replace(region("db"), segments=(Segment(12, 6, 2 * UNIT, 3 * UNIT, whole),))
    maps = (
        b"7f0000000000-7f0000200000 rw-s 00600000 00:06 11 /dev/memconsole/lab/web\n"  # of db, by web's file
        b"7f1000000000-7f1000400000 rw-s 00400000 00:06 12 /dev/memconsole/lab/db\n"  # the end of web, and of db
    )
    census = Census("/", {7: Process(7, "p", "S", 1, 77, 0, False, {}, maps, 7, 1)}, ())
    found = region_mappings(census, [one, two])
    assert [(each.region, each.offset) for each in found] == [("db", 0), ("web", UNIT), ("db", -UNIT)]
    asked = grant("g1", "web", length=UNIT)
    assert [each.overlaps(asked) for each in found] == [False, False, False]


# --- the verbs --------------------------------------------------------------------------------------------------


def desk_with_pieces(desk: Desk) -> None:
    """Two regions of one device, and a third of another."""
    whole = os.makedev(252, 0)
    pieces = (
        msgspec.structs.replace(region("web"), segments=(Segment(11, 6, 2 * UNIT, UNIT, whole),)),
        msgspec.structs.replace(region("db"), segments=(Segment(12, 6, 2 * UNIT, 3 * UNIT, whole),)),
        msgspec.structs.replace(region("far"), segments=(Segment(13, 6, 2 * UNIT, UNIT, whole + 1),)),
    )
    desk.change(StateChange(regions=pieces, guests=(guest("p"), guest("vm", GuestKind.CANARY), guest("q"))))


@pytest.mark.parametrize(
    ("has", "wants", "fine"),
    [
        (("web", "vm"), ("db", "vm"), True),
        (("web", "vm"), ("db", "p"), False),
        (("web", "p"), ("db", "vm"), False),
        (("web", "p"), ("db", "p"), False),
        (("web", "p"), ("far", "q"), True),
    ],
)
def test_a_stranger_shares_a_device_with_nobody(
    tmp_path: Path, has: tuple[str, str], wants: tuple[str, str], fine: bool
) -> None:
    with desks(tmp_path) as desk:
        desk_with_pieces(desk)
        desk.change(StateChange(grants=(grant("g1", *has),)))
        found = list(grant_verbs.shared_device(desk, grant("g2", *wants)))
        assert (not found) is fine


def test_no_vm_starts_beside_a_stranger(tmp_path: Path) -> None:
    from memconsole.backend.work import PreparedAction

    with desks(tmp_path) as desk:
        desk_with_pieces(desk)
        for given, refused in ((grant("g1", "web", "vm"), []), (grant("g1", "web", "p"), ["Shared"])):
            desk.change(StateChange(grants=(given,)))
            work = PreparedAction("new", "")
            grant_verbs.refuse_beside_strangers(work, desk, GuestStart("new", store="devdax"))
            assert [each.code for each in work.refusals] == refused


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("lab", "", ["NoService", "HoldsUnknown"]),
        ("../x", "dax0.0", ["NoService", "BadName", "HoldsUnknown"]),
        ("lab", "dax9.9", ["NoService", "NoRange"]),
    ],
)
def test_a_device_that_holds_anything_is_not_formatted(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, name: str, device: str, expected: list[str]
) -> None:
    host.spoil(9 * UNIT, b"somebody's")
    monkeypatch.setattr(ranges, "devdax", lambda _: (host.device,))
    with desks(tmp_path) as desk:
        with_store(desk, host)
        work = verbs.create(desk, ArenaCreate(name, device, devdax=True))
        assert [each.code for each in work.refusals] == expected
        assert not work.steps
        assert all(each.remedy for each in work.refusals)


def test_closing_lets_go_of_the_lock(host: Host, store: PieceStore) -> None:
    store.close()
    found = ranges.opened(host.device, host.tree.root)
    assert found is not None
    with closing(found):
        assert found.said.name == "lab"
