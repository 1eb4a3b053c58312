"""Guests whose memory could be mapped by huge pages and is not: shown, found, and never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support.synthetic import snapshot
from support.trees import FakeProcess, Tree, maps_line
from support.waiting import until

from memconsole.backend.observe import paging
from memconsole.backend.observe.paging import PagingSurvey
from memconsole.backend.wire import metrics
from memconsole.fields import TABLES
from memconsole.model import Guest, GuestKind, GuestSeen, GuestState, RamBlock, Severity, Snapshot

M, G = 1 << 20, 1 << 30
START = 0x7F0000000000
WHOLE = RamBlock(START, G, G, 0, None, "/memfd:memconsole:web:0", 0, mapped=G, huge=G, eligible=True)


def ram_of(guest: Guest) -> RamBlock:
    assert guest.seen is not None
    return guest.seen.ram[0]


def host(block: RamBlock, policy: str = "advise", kind: GuestKind = GuestKind.QEMU, **region: Any) -> Snapshot:
    seen = GuestSeen("qemu", 0, G, 3, ram=(block,))
    guest = Guest("vm", kind, GuestState.RUNNING, 4000, 7, memory=G, seen=seen)
    plain = snapshot(2, 0, findings=0)
    regions = plain.regions
    if region:
        assert regions[0].seen is not None
        seen_region = replace(regions[0].seen, **region)
        regions = (replace(regions[0], name="web", seen=seen_region), *regions[1:])
    return replace(plain, guests=(guest,), regions=regions, memory=replace(plain.memory, shmem_thp=policy))


def small(**changes: Any) -> RamBlock:
    return replace(WHOLE, **{"huge": 0, **changes})


@pytest.mark.parametrize(
    ("shown", "severity", "why"),
    [
        (host(small(start=START + 4096, eligible=False)), Severity.WARNING, "no multiple of 2 MiB"),
        (host(small(offset=4096)), Severity.WARNING, "no multiple of 2 MiB"),
        (host(small(start=START + 4096, eligible=False), "never"), Severity.WARNING, "no multiple of 2 MiB"),
        (host(small(eligible=False), "never"), Severity.INFO, "shmem_enabled is never"),
        (host(small(eligible=False)), Severity.WARNING, "THPeligible is 0"),
        (host(small(region="web"), huge=G), Severity.WARNING, "frames are huge"),
        (host(small(region="web", eligible=False), "never", huge=G), Severity.WARNING, "THPeligible is 0"),
        (host(small(start=START + 4096), kind=GuestKind.FOREIGN), Severity.WARNING, "no multiple of 2 MiB"),
    ],
)
def test_what_could_be_and_is_not_is_found(shown: Snapshot, severity: Severity, why: str) -> None:
    (found,) = paging.base_pages(shown)
    assert (found.id, found.severity, found.subject) == ("guest-base-pages", severity, "vm")
    assert why in found.observed
    assert f"{G >> 30}G" in found.observed
    assert f"{ram_of(shown.guests[0]).start:#x}" in found.evidence
    assert "stop" not in found.remedy
    assert "release" not in found.remedy


@pytest.mark.parametrize(
    "shown",
    [
        host(WHOLE),
        host(small(start=START + 4096, mapped=None, huge=None, eligible=None)),  # nobody has looked
        host(small()),  # its frames were not scanned
        host(small(region="web"), huge=0),  # they are base pages: another finding's matter
        host(small(start=START + 4096, mapped=64 * M)),
        host(small(start=START + 4096, offset=4096, huge=G - 4 * M)),
        host(small(start=START + 4096, offset=0, backing="anonymous")),
    ],
)
def test_where_it_cannot_be_or_is_not_known_nothing_is_said(shown: Snapshot) -> None:
    assert list(paging.base_pages(shown)) == []


def test_a_lazy_grant_is_meant_to_come_page_by_page() -> None:
    shown = host(small(region="web", start=START + 4096))
    grant = replace(snapshot(1, 1).grants[0], guest="vm", region="web")
    assert list(paging.base_pages(replace(shown, grants=(replace(grant, lazy=True),)))) == []
    assert len(list(paging.base_pages(replace(shown, grants=(grant,))))) == 1


def test_a_guest_of_which_a_part_is_not_known_has_no_figure() -> None:
    unknown = replace(WHOLE, start=START + 2 * G, mapped=None, huge=None, eligible=None)
    (field,) = [field for field in TABLES["guests"].fields if field.id == "huge"]
    for ram, value, text in (((WHOLE, WHOLE), 2 * G, "2G"), ((WHOLE, unknown), None, "-"), ((), None, "-")):
        guest = replace(host(WHOLE).guests[0], seen=GuestSeen("qemu", 0, G, 3, ram=ram))
        assert field.get(guest) == value
        assert field.show(field.get(guest)) == text
        told = metrics.text(replace(host(WHOLE), guests=(guest,)))
        assert ('memconsole_guest_huge_mapped_bytes{guest="vm"}' in told) is (value is not None)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.host()
    row = maps_line(START, START + G, "rw-s", 0, (0, 1), 9, "/memfd:memconsole:web:0 (deleted)")
    smaps = row + f"Rss: {G >> 10} kB\nShmemPmdMapped: {512 << 10} kB\nTHPeligible: 1\n"
    made.process(FakeProcess(4000, maps=row, smaps=smaps, start_ticks=7))
    return made


def test_a_look_fills_in_how_memory_is_mapped(tree: Tree) -> None:
    looks = PagingSurvey(tree.root)
    bare = host(replace(WHOLE, mapped=None, huge=None, eligible=None))

    def seen() -> RamBlock:
        return ram_of(looks.shown(bare).guests[0])

    until(lambda: seen().huge is not None, "a look")
    assert (seen().mapped, seen().huge, seen().eligible) == (G, 512 * M, True)


def test_what_cannot_be_read_stays_unknown_and_holds_nobody_up(tree: Tree) -> None:
    looks = PagingSurvey(tree.root)
    bare = host(replace(WHOLE, mapped=None, huge=None, eligible=None))
    gone = replace(bare, guests=(replace(bare.guests[0], pid=4001), *bare.guests))
    until(lambda: ram_of(looks.shown(gone).guests[1]).huge is not None, "a look")
    assert ram_of(looks.shown(gone).guests[0]).huge is None
