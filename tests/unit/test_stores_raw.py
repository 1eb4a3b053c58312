"""Memory without struct pages: which ranges of a host may be used, and what is refused; a file stands for /dev/mem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, desks, guest
from support.trees import Tree

from memconsole.actions import ArenaCreate, Map
from memconsole.backend.diagnose import arenas as looked
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.stores import ranges, raw
from memconsole.backend.stores.described import UNIT
from memconsole.backend.stores.ranges import Range
from memconsole.backend.stores.raw import RawStore
from memconsole.backend.verbs import arenas as verbs
from memconsole.backend.verbs import grants as grant_verbs
from memconsole.errors import KernelRefused, NotFound
from memconsole.extents import Flag
from memconsole.model import Access, GuestKind, Region, RegionState

M = 1 << 20
START = 64 * M
SIZE = 16 * M
NAME = "0x04000000"
IOMEM = """00001000-03ffffff : System RAM
04000000-04ffffff : Reserved
05000000-3fffffff : System RAM
fed00000-fed00fff : Reserved
  fed00000-fed003ff : HPET 0
"""


@pytest.fixture
def host(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path / "host")
    tree.write("/etc/machine-id", "abc\n")
    tree.write("/proc/cmdline", f"quiet memmap=16M${START:#x}\n")
    tree.write("/proc/iomem", IOMEM)
    tree.write("/dev/mem", "")
    os.truncate(tree.root / "dev/mem", START + SIZE)  # holes: nothing of it is written but the range
    return tree


def _another_name(device: Range, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.hardlink_to(device.path)


@pytest.fixture
def store(host: Tree, tmp_path: Path) -> Iterator[RawStore]:
    made = RawStore([START], lasting=True, root=host.root, nodes=tmp_path / "nodes", node=_another_name)
    yield made
    made.close()


def trouble(host: Tree) -> str:
    (found,) = raw.reserved(host.root)
    return found.trouble


def test_what_the_command_line_keeps_from_the_kernel_is_a_range(host: Tree) -> None:
    (found,) = raw.reserved(host.root)
    assert (found.name, found.base, found.start, found.size, found.trouble) == (NAME, START, START, SIZE, "")
    assert found.number == os.makedev(1, 1)
    assert found.where.endswith("/dev/mem at 0x04000000")


def test_only_whole_units_of_a_range_are_used(host: Tree) -> None:
    host.write("/proc/cmdline", f"memmap=15M${START + M:#x}\n")
    (found,) = raw.reserved(host.root)
    assert (found.base, found.size, found.trouble) == (START + 2 * M, 14 * M, "")


def test_other_words_are_other_stores(host: Tree) -> None:
    host.write("/proc/cmdline", "memmap=16M!64M memmap=1M#2M memmap=nonsense$1M mem=1G\n")
    assert raw.reserved(host.root) == ()
    (host.root / "proc/cmdline").unlink()
    assert raw.reserved(host.root) == ()


@pytest.mark.parametrize(
    ("iomem", "why"),
    [
        ("00001000-3fffffff : System RAM\n", "System RAM"),
        ("04000000-04ffffff : System RAM (kmem)\n", "System RAM"),
        ("04000000-04ffffff : Reserved\n  04100000-041fffff : ramoops\n", "ramoops"),
        ("04000000-04ffffff : ACPI Non-volatile Storage\n", "ACPI Non-volatile Storage"),
        ("04000000-04ffffff : PCI Bus 0000:00\n  04000000-04ffffff : Reserved\n", "PCI Bus"),
        ("04000000-047fffff : Reserved\n", "does not say that it is reserved"),
        ("00001000-00ffffff : Reserved\n", "does not say that it is reserved"),
        ("00000000-00000000 : Reserved\n", "hides its addresses"),
        ("nonsense\n", "not shown whose it is"),
    ],
)
def test_what_is_the_kernels_a_devices_or_unknown_is_refused(host: Tree, iomem: str, why: str) -> None:
    host.write("/proc/iomem", iomem)
    assert why in trouble(host)


@pytest.mark.parametrize(
    ("kinds", "why"),
    [
        ([("0x0", "0x3fffffff", "System RAM")], ""),
        ([("0x0", "0x47fffff", "System RAM"), ("0x4800000", "0x3fffffff", "System RAM")], ""),
        ([("0x0", "0x3ffffff", "System RAM")], "does not say that there is memory at 0x04000000"),
        ([("0x0", "0x3ffffff", "System RAM"), ("0x4000000", "0x4ffffff", "Reserved")], "Reserved is there"),
        ([("0x0", "0x48fffff", "System RAM"), ("0x4900000", "0x4ffffff", "ACPI Tables")], "ACPI Tables is there"),
    ],
)
def test_what_the_firmware_does_not_call_memory_is_refused(
    host: Tree, kinds: list[tuple[str, str, str]], why: str
) -> None:
    for number, (start, end, kind) in enumerate(kinds):
        for name, value in {"start": start, "end": end, "type": kind}.items():
            host.write(f"/sys/firmware/memmap/{number}/{name}", value + "\n")
    assert why in trouble(host) if why else trouble(host) == ""


def test_what_keeps_dev_mem_shut_is_named(host: Tree) -> None:
    host.write("/proc/cmdline", f"memmap=16M${START:#x} memmap=2M${START + M:#x}\n")
    assert all(
        "names a part of it, too" in each.trouble or "are needed" in each.trouble for each in raw.reserved(host.root)
    )
    host.write("/proc/cmdline", f"memmap=3M${START:#x}\n")
    assert "4M are needed" in trouble(host)
    host.write("/proc/cmdline", f"memmap=16M${START:#x}\n")
    host.write("/sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    assert "locked down (integrity)" in trouble(host)
    (host.root / "sys/kernel/security/lockdown").unlink()
    (host.root / "dev/mem").unlink()
    assert "there is no /dev/mem" in trouble(host)


def test_a_range_that_nobody_named_is_not_even_read(host: Tree, tmp_path: Path) -> None:
    (host.root / "dev/mem").chmod(0)
    unnamed = RawStore([], lasting=True, root=host.root, nodes=tmp_path / "nodes")
    assert not unnamed.may_know()
    assert unnamed.arenas() == ()
    (refusal,) = unnamed.reserve_refusals(2 * UNIT, 4096, None, promised=0, root=host.root)
    assert refusal.code == "NotNamed"
    assert "--raw START" in refusal.remedy
    (seen,) = looked.ranges(host.root)
    assert (seen.device, seen.holds, seen.words) == (NAME, "", f"memmap=16M${START:#x}")
    assert f"arena list --raw {NAME}" in seen.trouble


def test_a_name_that_is_no_range_is_a_finding(host: Tree, tmp_path: Path) -> None:
    wrong = RawStore([START + UNIT], lasting=True, root=host.root, nodes=tmp_path / "nodes")
    assert wrong.arenas() == ()
    _, (finding,) = wrong.found(())
    assert finding.id == "arena-unused"
    assert "no memmap=SIZE$START of this kernel's command line begins there" in finding.evidence
    (refusal,) = wrong.reserve_refusals(2 * UNIT, 4096, None, promised=0, root=host.root)
    assert refusal.code == "NoArena"


def test_a_region_is_found_again_and_its_map_is_derived(host: Tree, store: RawStore, tmp_path: Path) -> None:
    (device,) = store.ranges()
    store.create("lab", device)
    (fd,) = store.reserve_segments("web", 2 * UNIT, 4096, None, prefault=False, promised=0)
    (segment,) = store.segments([fd])
    assert (segment.start, segment.size) == (START + UNIT, 2 * UNIT)  # an offset in /dev/mem is a physical address
    with store.frames(fd, segment.size) as table:
        (row,) = list(table)
    assert (row.pfn, row.count) == ((START + UNIT) // 4096, 2 * UNIT // 4096)
    assert Flag(row.flags) == Flag.PRESENT | Flag.FILE | Flag.DERIVED
    region = Region("web", "raw", 2 * UNIT, 4096, RegionState.RESERVED, segments=(segment,))
    store.describe([fd], region)
    os.pwrite(fd, b"kept", segment.start)
    os.close(fd)
    store.close()
    (seen,) = looked.ranges(host.root, raw=[START])
    assert (seen.holds, [each.name for each in seen.regions]) == ("arena lab", ["web"])
    assert looked.check("lab", host.root, raw=[START]) == ()
    later = RawStore([START], lasting=True, root=host.root, nodes=tmp_path / "nodes", node=_another_name)
    ((found,), told) = later.found(())
    assert (found.region.name, told) == ("web", [])
    assert os.pread(found.fds[0], 4, segment.start) == b"kept"
    os.close(found.fds[0])
    later.close()


def test_each_range_of_one_device_file_has_a_lock_of_its_own(host: Tree, store: RawStore) -> None:
    (device,) = store.ranges()
    half = device._replace(size=SIZE // 2)
    other = device._replace(name="other", base=START + SIZE // 2, size=SIZE // 2)
    first = ranges.create(half, "one", host.root)
    second = ranges.create(other, "two", host.root)
    for each in (half, other):
        with pytest.raises(Exception, match="is not used"):
            ranges.opened(each, host.root)
    first.close()
    ranges.opened(half, host.root).close()  # type: ignore[union-attr]
    second.close()


def test_the_kernel_that_does_not_let_it_be_mapped_is_told_by_name(host: Tree, store: RawStore) -> None:
    (device,) = store.ranges()
    with pytest.raises(KernelRefused, match="0x04000000 cannot be opened") as refused:
        ranges.contents(device._replace(path=str(host.root / "dev/gone")))
    assert "CONFIG_STRICT_DEVMEM" in refused.value.remedy


def with_store(desk: Desk, store: RawStore) -> Desk:
    desk.__dict__["stores"] = {**desk.stores, "raw": store}
    return desk


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (ArenaCreate("lab", raw=True), ""),
        (ArenaCreate("lab", NAME, raw=True), ""),
        (ArenaCreate("lab", "0x05000000", raw=True), "NoRange"),
        (ArenaCreate("lab", raw=True, devdax=True), "BadArena"),
        (ArenaCreate("no/name", raw=True), "BadName"),
    ],
)
def test_an_arena_is_made_of_a_range_that_was_named(
    tmp_path: Path, host: Tree, store: RawStore, monkeypatch: pytest.MonkeyPatch, action: ArenaCreate, code: str
) -> None:
    with desks(tmp_path / "desk") as desk:
        monkeypatch.setattr(type(desk.custody), "survives", True)
        work = verbs.create(with_store(desk, store), action)
        assert [each.code for each in work.refusals] == ([code] if code else [])
        if not code:
            for step in work.steps:
                step.do()
            assert f"arena lab is on {host.root}/dev/mem at {NAME}: 14M for regions" in work.text
            assert store.arenas()[0].said.name == "lab"


@pytest.mark.parametrize(
    ("spoil", "code"), [("iomem", "NotOurs"), ("bytes", "HoldsUnknown"), ("arena", "HoldsArena"), ("none", "NotNamed")]
)
def test_what_is_somebody_elses_becomes_no_arena(
    tmp_path: Path, host: Tree, store: RawStore, monkeypatch: pytest.MonkeyPatch, spoil: str, code: str
) -> None:
    if spoil == "iomem":
        host.write("/proc/iomem", "00001000-3fffffff : System RAM\n")
    elif spoil == "bytes":
        with (host.root / "dev/mem").open("r+b") as file:
            file.seek(START + SIZE - 1)
            file.write(b"x")
    elif spoil == "arena":
        store.create("lab", store.ranges()[0])
    elif spoil == "none":
        store = RawStore([], lasting=True, root=host.root)
    with desks(tmp_path / "desk") as desk:
        monkeypatch.setattr(type(desk.custody), "survives", True)
        (refusal,) = verbs.create(with_store(desk, store), ArenaCreate("more", raw=True)).refusals
    assert refusal.code == code
    if code == "HoldsUnknown":
        assert "skip=32 count=8" in refusal.remedy
        assert "seek=32 count=8 conv=notrunc" in refusal.remedy


def test_a_process_is_given_no_descriptor_of_all_memory(tmp_path: Path, store: RawStore) -> None:
    store.create("lab", store.ranges()[0])
    with desks(tmp_path / "desk") as desk:
        with_store(desk, store)
        region = Region("web", "raw", 2 * UNIT, 4096, RegionState.RESERVED)
        guests = (guest("proc", kind=GuestKind.PROCESS), guest("vm", kind=GuestKind.CANARY))
        desk.change(StateChange(regions=(region,), guests=guests))
        codes = {
            name: [each.code for each in grant_verbs.map(desk, Map("web", name)).refusals] for name in ("proc", "vm")
        }
    assert "NoVm" in codes["proc"]
    assert "NoVm" not in codes["vm"]


def test_a_service_without_the_word_says_what_it_lacks(host: Tree, store: RawStore, tmp_path: Path) -> None:
    store.create("lab", store.ranges()[0])
    (fd,) = store.reserve_segments("web", 2 * UNIT, 4096, None, prefault=False, promised=0)
    unnamed = RawStore([], lasting=True, root=host.root, nodes=tmp_path / "nodes")
    with pytest.raises(NotFound, match="region web is not handed out") as refused:
        unnamed.segment_fd(fd, Access.RW)  # without its place it would be memory at 0
    assert "--raw START" in refused.value.remedy
    os.close(fd)
