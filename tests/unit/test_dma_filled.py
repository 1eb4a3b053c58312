"""What a device reaches where its VMM fills the address space: frames count, not where the guest finds them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.desks import Live, desks, guest

from memconsole.backend.dma import check
from memconsole.backend.dma.vmm_check import compare, merged, within
from memconsole.backend.kernel import patient
from memconsole.extents import Extent, Flag
from memconsole.model import Access, Grant, GrantState, GuestKind

EDU = "0000:00:04.0"
RAM = Grant("g1", "vm", "vm", 0, 64 * 4096, Access.RW, GrantState.MAPPED, gpa=0, dma=EDU)
GRANTED = [(7000, 40), (9000, 24)]
OWN = [(100, 4), (104, 4), (300, 1)]
"""Firmware, in two mappings that follow each other, and something else."""


def run(page: int, pfn: int, pages: int) -> Extent:
    return Extent(page, pfn, pages, Flag.PRESENT | Flag.READ | Flag.WRITE)


def found(*runs: Extent, grants: Sequence[Grant] = (RAM,), granted: Sequence[tuple[int, int]] = GRANTED) -> list[str]:
    findings = list(compare(EDU, grants, runs, granted, OWN))
    assert all(finding.observed and finding.evidence and finding.remedy for finding in findings)
    return [finding.id for finding in findings]


def test_ram_and_firmware_are_no_finding_wherever_the_guest_has_them() -> None:
    assert found(run(0, 7000, 40), run(40, 9000, 24), run(0xFFFF8, 100, 8)) == []
    assert found(run(0x100000, 9000, 24), run(0, 7010, 3)) == []
    assert found(run(0xC0, 102, 4), run(0, 7000, 1)) == []


@pytest.mark.parametrize(
    "other",
    [
        run(5, 6999, 1),
        run(5, 6999, 3),
        run(5, 7039, 2),
        run(5, 50, 1),
        run(5, 8000, 1),
        run(5, 20000, 1),
        run(5, 100, 9),
    ],
)
def test_any_other_frame_is_found(other: Extent) -> None:
    assert found(run(0, 7000, 1), other) == ["dma-unknown"]


def test_how_much_and_where_is_said() -> None:
    (finding,) = compare(EDU, [RAM], [run(0, 7000, 40), run(0x20000, 6998, 4)], GRANTED, OWN)
    assert "8K" in finding.observed.replace(" ", "").replace("iB", "")
    assert "0x20000000" in finding.evidence


def test_a_device_that_reaches_nothing_of_its_grants_is_found() -> None:
    assert found() == ["dma-missing"]
    assert found(run(0xFFFF8, 100, 8)) == ["dma-missing"]


def test_a_device_whose_grants_were_taken_back_reaches_nothing_of_the_region() -> None:
    assert found(grants=(), granted=()) == []
    assert found(run(0xFFFF8, 100, 8), grants=(), granted=()) == []
    assert found(run(0, 7000, 1), grants=(), granted=()) == ["dma-unknown"]


def test_what_of_a_run_is_known_is_cut_to_it() -> None:
    known = merged([(30, 5), (10, 4), (14, 2), (31, 2), (50, 10)])
    assert known == [(10, 16), (30, 35), (50, 60)]
    assert list(within(run(0, 12, 30), known)) == [(12, 16), (30, 35)]
    assert list(within(run(0, 10, 2), known)) == [(10, 12)]
    assert list(within(run(0, 16, 14), known)) == []
    assert list(within(run(0, 59, 9), known)) == [(59, 60)]


def test_a_vmm_whose_memory_map_is_locked_is_told_of_and_nothing_is_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = guest("vm", pid=os.getpid())
    with (
        desks(tmp_path, guests=(vm,), live=(Live("vm", GuestKind.QEMU, os.getpid()),)) as desk,
        contextlib.ExitStack() as opened,
    ):
        look = check._TableReader(desk, (), opened)
        assert check._vmm_filled(look, "vm", EDU, ()) == []
        with monkeypatch.context() as locked:
            locked.setitem(patient._blocked, os.getpid(), time.monotonic())
            (finding,) = check._vmm_filled(look, "vm", EDU, ())
        assert (finding.id, finding.subject) == ("dma-unseen", EDU)
        assert f"process {os.getpid()} does not show its memory" in finding.observed
        assert finding.remedy
        assert check._vmm_filled(look, "vm", EDU, ()) == []
