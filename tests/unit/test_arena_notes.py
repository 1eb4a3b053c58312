"""Arenas that a host had, on a kernel that does not set their ranges aside: named, with what to boot."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import cast
from unittest import mock

import pytest
from support.desks import desks
from support.trees import Tree

from memconsole.actions import ArenaRemove
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.stores import memfd
from memconsole.backend.stores.base import HeldRange, Store
from memconsole.backend.stores.noted import FILE, ArenaNotes, NotedArena
from memconsole.backend.verbs import arenas as verbs
from memconsole.model import Finding

M, G = 1 << 20, 1 << 30
WORD = "memmap=256M!1G"


def booted(place: Path, line: str, *devices: tuple[int, int]) -> Path:
    """The tree of a kernel with this command line, which shows pmem devices of so many bytes at an address."""
    place.mkdir()
    tree = Tree(place)
    tree.write("/proc/cmdline", f"quiet {line}\n")
    for number, (size, start) in enumerate(devices):
        base = f"/sys/class/block/pmem{number}"
        tree.write(f"{base}/size", f"{size // 512}\n")
        tree.write(f"{base}/dev", f"259:{number}\n")
        tree.write(f"{base}/device/resource", f"{start:#x}\n")
    return Path(tree.root)


def used(*ranges: HeldRange) -> list[Store]:
    """The stores of a control process that uses these."""
    store = mock.Mock()
    store.held_ranges.return_value = ranges
    return [cast("Store", memfd), cast("Store", store)]


LAB = HeldRange("lab", G, 256 * M)


def noted(tmp_path: Path, word: str = WORD) -> Path:
    """A state directory in which an arena is noted."""
    state = tmp_path / "state"
    state.mkdir()
    ArenaNotes(state, booted(tmp_path / "before", word, (256 * M, G))).look(used(LAB))
    return state


def said(state: Path, root: Path) -> tuple[Finding, ...]:
    return ArenaNotes(state, root).findings()


def test_an_arena_whose_word_was_left_out_is_named_with_what_to_boot(tmp_path: Path) -> None:
    state = noted(tmp_path)
    (found,) = said(state, booted(tmp_path / "now", ""))
    assert (found.id, found.subject) == ("arena-missing", "lab")
    assert f"256M at 0x40000000, is not there: this kernel's command line lacks {WORD}" in found.observed
    assert f"boot with {WORD}" in found.remedy


@pytest.mark.parametrize(
    ("line", "devices", "there"),
    [
        (WORD, ((256 * M, G),), True),
        ("memmap=512M!1G", ((512 * M, G),), True),
        ("memmap=128M!1G", ((128 * M, G),), False),
        ("memmap=256M!2G", ((256 * M, 2 * G),), False),
        ("memmap=256M$1G", (), False),
    ],
)
def test_an_arena_is_there_where_a_device_has_all_of_its_range(
    tmp_path: Path, line: str, devices: tuple[tuple[int, int], ...], *, there: bool
) -> None:
    state = noted(tmp_path)
    assert (said(state, booted(tmp_path / "now", line, *devices)) == ()) is there


def test_a_range_without_a_device_is_there_by_its_word(tmp_path: Path) -> None:
    state = noted(tmp_path, "memmap=256M$1G")
    assert not said(state, booted(tmp_path / "same", "memmap=0x10000000$0x40000000"))
    assert [each.subject for each in said(state, booted(tmp_path / "now", ""))] == ["lab"]


def test_a_kernel_that_has_no_driver_for_it_is_told_apart(tmp_path: Path) -> None:
    (found,) = said(noted(tmp_path), booted(tmp_path / "now", WORD))
    assert "shows no device for it" in found.observed
    assert "CONFIG_X86_PMEM_LEGACY" in found.remedy


def test_an_arena_of_hardware_has_no_word(tmp_path: Path) -> None:
    (found,) = said(noted(tmp_path, ""), booted(tmp_path / "now", ""))
    assert "its device" in found.observed
    assert "memmap" not in found.remedy


def test_an_arena_stays_noted_until_its_range_is_another_ones(tmp_path: Path) -> None:
    state = noted(tmp_path)
    root = booted(tmp_path / "now", "memmap=1G!4G", (G, 4 * G))
    notes = ArenaNotes(state, root)
    notes.look(used(HeldRange("new", 4 * G, G)))
    assert [each.subject for each in said(state, root)] == ["lab"]
    notes.look(used(HeldRange("other", G + 16 * M, 64 * M), HeldRange("new", 4 * G, G)))
    assert [each.name for each in ArenaNotes(state, booted(tmp_path / "bare", "")).missing()] == ["other", "new"]


@pytest.mark.parametrize("raw", [b"{", b'{"arenas": [{"name": 1}]}', b"\xff" * 100, b"[]"])
def test_a_note_that_is_damaged_is_a_finding_and_is_written_anew(tmp_path: Path, raw: bytes) -> None:
    root = booted(tmp_path / "now", WORD, (256 * M, G))
    (tmp_path / FILE).write_bytes(raw)
    notes = ArenaNotes(tmp_path, root)
    assert [each.id for each in notes.findings()] == ["arena-note"]
    notes.look(used(LAB))
    assert notes.findings() == said(tmp_path, root) == ()
    assert ArenaNotes(tmp_path, booted(tmp_path / "bare", "")).missing() == (
        NotedArena(name="lab", start=G, size=256 * M, word=WORD),
    )


def test_a_note_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    notes = ArenaNotes(tmp_path / "nowhere", booted(tmp_path / "now", WORD, (256 * M, G)))
    notes.look(used(LAB))
    assert [each.id for each in notes.findings()] == ["arena-note"]


def test_a_snapshot_has_it(tmp_path: Path) -> None:
    ArenaNotes(tmp_path, booted(tmp_path / "before", WORD)).look(used(LAB._replace(start=1 << 52)))
    with contextlib.closing(Control(tmp_path / "run", OwnCustody(), state_dir=tmp_path)) as control:
        assert "arena-missing" in {each.id for each in control.snapshot().findings}


def test_an_arena_that_is_not_there_can_be_forgotten_and_nothing_is_written_to_its_range(tmp_path: Path) -> None:
    state = noted(tmp_path)
    root = booted(tmp_path / "now", "")
    (tmp_path / "desk").mkdir()
    with desks(tmp_path / "desk") as desk:
        desk.noted = ArenaNotes(state, root)
        work = verbs.remove(desk, ArenaRemove("lab"))
        assert [step.id for step in work.steps] == ["forget"]
        work.steps[0].do()
        assert said(state, root) == ()
