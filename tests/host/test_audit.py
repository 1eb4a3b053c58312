"""Findings provoked on real memory and real processes, and a frame followed to everybody who reaches it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest
from support.controls import M, controls, grant
from support.guests import AgentProcess

from memconsole import actions as do
from memconsole import joined
from memconsole.backend.control import Control
from memconsole.backend.observe import pfn_tables
from memconsole.errors import NotFound
from memconsole.joined import Frame, Joined
from memconsole.model import Severity

PAGE = 4096
PUNCH_KEEP_SIZE = 3


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


def found(control: Control) -> list[tuple[str, str]]:
    return [(finding.id, finding.subject) for finding in control.snapshot().findings]


def moved(control: Control, name: str, pages: int) -> None:
    """Empty the first pages of a region, and fill them again once others have the frames."""
    with control._desk.borrowed_fds(name) as fds:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.fallocate(fds[0], PUNCH_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(pages * PAGE)) == 0
        other = os.memfd_create("other", os.MFD_CLOEXEC)
        os.write(other, bytes(4 * M))
        os.pwrite(fds[0], bytes(pages * PAGE), 0)
        os.close(other)


def test_frames_that_changed_are_found_until_the_region_lies_in_another_file(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("frames are shown to root alone")
    monkeypatch.setattr(pfn_tables, "FRESH_S", 0)
    control.apply(do.Reserve("web", 8 * M, prefault=True))
    for _ in range(2):
        control.extents("region:web").close()
        assert found(control) == []
    moved(control, "web", 3)
    control.extents("region:web").close()
    (finding,) = control.snapshot().findings
    assert (finding.id, finding.subject, finding.severity) == ("region-moved", "web", Severity.INFO)
    assert "12K" in finding.observed
    control.extents("region:web").close()
    assert found(control) == [("region-moved", "web")]


def test_a_grant_that_was_dropped_without_a_word_is_found(control: Control) -> None:
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.Reserve("web", M))
        id = control.apply(do.Map("web", "db")).subject
        assert process.do(f"wait {id}") == id
        assert found(control) == []
        assert process.do(f"drop {id}") == "done"
        assert found(control) == [("grant-unmapped", id)]


def test_a_frame_is_followed_to_the_process_and_from_its_address_back(control: Control) -> None:
    if os.geteuid() != 0:
        pytest.skip("frames are shown to root alone")
    with AgentProcess(control.runtime_dir / "agents") as process:
        control.apply(do.GuestAttach("db", process.pid))
        control.apply(do.Reserve("web", M, prefault=True))
        id = control.apply(do.Map("web", "db", gpa=0x10000000)).subject
        assert process.do(f"wait {id}") == id
        assert process.do(f"write {id} x") == "done"
        snapshot = control.snapshot()
        whole = joined.resolve_target(snapshot, control, "db")
        assert isinstance(whole, Joined)
        assert sum(span.size for span in whole.spans) == M
        mapping = grant(snapshot, id).seen[0]
        with control.extents("region:web") as table:
            row = table[table.lookup(5) or 0]
            pfn = row.pfn + 5 - row.offset
        for target in (f"{pfn:#x}", f"{5 * PAGE:#x}@region:web"):
            frame = joined.resolve_target(snapshot, control, target)
            assert isinstance(frame, Frame)
            assert (frame.region, frame.offset, frame.guests) == ("web", 5 * PAGE, (("db", 0x10005000),))
            assert {(each.kind, each.who, each.address) for each in frame.reached} >= {
                ("kernel", "kernel", None),
                ("process", str(process.pid), mapping.start + 5 * PAGE),
            }
    with pytest.raises(NotFound):
        joined.resolve_target(snapshot, control, "0x7ffffff000@web")
