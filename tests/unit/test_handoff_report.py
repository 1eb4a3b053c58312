"""Manifest, report and timeline: what is written is what is read, and what is broken is named."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from memconsole import timeline
from memconsole.backend.handoff import bootplan, manifest, report
from memconsole.backend.handoff.bootplan import Hold, Moment, Phase, Plan, Resume, Resumed
from memconsole.backend.handoff.manifest import Manifest, Placed, Stopped
from memconsole.backend.handoff.report import Clock, Progress
from memconsole.errors import BadFile
from memconsole.model import (
    Access,
    Carried,
    CarriedDevice,
    Grant,
    GrantState,
    Guest,
    GuestKind,
    GuestState,
    HandoffReport,
    HandoffState,
    Kept,
    Region,
    RegionState,
    Segment,
)

MS = 1_000_000
GUEST = Guest("web", GuestKind.CANARY, GuestState.RUNNING, 7, 8, memory=64 << 20)
REGION = Region("web", "memfd", 64 << 20, 4096, RegionState.RESERVED, segments=(Segment(1, 2, 64 << 20),))
REPORT = HandoffReport(
    "run", HandoffState.RUNNING, 10**18, "7.3.4", "7.3.5", guests=(Carried("web", GuestKind.CANARY, 64 << 20),)
)


def at(ms: float, ticks: int = 0) -> Moment:
    return Moment(ticks or int(ms * 1000) + 1, int(ms * MS), 10**18 + int(ms * MS))


def described() -> Manifest:
    return Manifest(
        tool="memconsole 0",
        kernel="7.3.4",
        boot_id="b",
        command_line="kho=on",
        number=3,
        began=at(0),
        written=at(100),
        regions=(Placed(REGION, "memconsole:web", (1,), ("00" * 16,), 5, 1000),),
        guests=(Stopped(GUEST, "state:web", at(60)),),
        grants=(),
        windows=(),
        report=REPORT,
    )


PLAN = Plan((Hold("memconsole:web", 1, "region:web:0", b"{}"),))


def written() -> bytes:
    fd = manifest.write(PLAN, described())
    try:
        return manifest.content(fd)
    finally:
        os.close(fd)


def test_a_manifest_reads_back_and_begins_with_its_plan() -> None:
    raw = written()
    assert manifest.read(raw) == described()
    assert bootplan.decode(raw)[:4] == PLAN[:4]
    assert len(raw) % 4096 == 0


@given(st.data())
def test_a_flipped_bit_in_the_second_part_is_named_and_never_believed(data: st.DataObject) -> None:
    raw = bytearray(written())
    begin = bootplan.end(bytes(raw))
    used = len(bytes(raw).rstrip(b"\0"))
    where = data.draw(st.integers(begin * 8, used * 8 - 1))
    raw[where // 8] ^= 1 << where % 8
    with pytest.raises(BadFile) as broken:
        manifest.read(bytes(raw))
    assert broken.value.code == "ManifestUnknown"


@pytest.mark.parametrize("keep", [0, 47, 4096, 4110, 4200])
def test_a_truncated_manifest_is_named(keep: int) -> None:
    with pytest.raises(BadFile):
        manifest.read(written()[:keep])


def test_another_version_is_named_and_says_which() -> None:
    raw = bytearray(written())
    raw[bootplan.end(bytes(raw)) + 8] = 9
    with pytest.raises(BadFile, match="cannot be read") as other:
        manifest.read(bytes(raw))
    assert "version 9" in other.value.why


def test_phases_follow_each_other_and_a_failure_ends_the_last() -> None:
    shown: list[HandoffReport] = []
    progress = Progress(REPORT, shown.append)
    for id in ("check", "preserve", "preserve", "pause"):
        progress.phase(id, id)
    progress.fail("it broke")
    last = shown[-1]
    assert [phase.id for phase in last.phases] == ["check", "preserve", "pause"]
    assert [phase.blackout for phase in last.phases] == [False, False, True]
    assert all(phase.end_ns is not None and phase.end_ns >= phase.start_ns for phase in last.phases)
    assert all(before.end_ns == after.start_ns for before, after in zip(last.phases, last.phases[1:], strict=False))
    assert (last.state, last.why) == (HandoffState.FAILED, "it broke")
    assert len(shown) == 5


def test_a_blackout_is_from_the_pause_to_what_the_monitor_said_over_the_kexec() -> None:
    # the second kernel's clocks begin anew; the processor's counter goes on at 1 tick a microsecond
    back = Moment(2_060_001, 500 * MS, 10**18)
    resume = Resume(1, "luo", (Phase("begun", back),), (Resumed("web", "started", 9, 10, at=back),), (), ())
    clock = Clock(at(0), [(at(0), at(100))])
    (carried,) = report.carried(REPORT.guests, described(), resume, clock)
    assert carried.back
    assert carried.pid == 9
    assert carried.blackout_ns == 2_000 * MS


def test_a_guest_that_is_held_has_no_blackout_and_says_why() -> None:
    resume = Resume(1, "luo", (), (Resumed("web", "held", why="no fd"),), (), ())
    (carried,) = report.carried(REPORT.guests, described(), resume, Clock(at(0), []))
    assert (carried.back, carried.blackout_ns, carried.why) == (False, None, "no fd")


def whole() -> HandoffReport:
    done = HandoffReport(
        "run",
        HandoffState.DONE,
        1,
        "a",
        "b",
        phases=(
            report.phase("preserve", "preserve <them>", 0, 50 * MS, blackout=False),
            report.phase("jump", "boot & go", 50 * MS, 950 * MS),
            report.phase("adopt", "adopt", 950 * MS, 1000 * MS, blackout=False),
        ),
        guests=(Carried("web", GuestKind.CANARY, 1, back=True, blackout_ns=900 * MS, by="guest"),),
    )
    return report.filled(done, [("web", 800 * MS)])


def test_the_picture_is_to_scale_and_fits() -> None:
    for width in (40, 80, 132):
        lines = timeline.lines(whole(), width)
        assert len(lines) == 4
        assert max(map(len, lines)) <= width
    jump = timeline.lines(whole(), 150)[1]
    assert jump.count("#") == 46  # 900 of 1000 ms in 50 cells, from the beginning of its first one
    assert "900.0ms" in jump or "900ms" in jump


def test_all_of_the_svg_lies_in_its_frame_over_a_scale_of_time() -> None:
    root = ET.fromstring(timeline.svg(whole()))
    wide = float(root.attrib["width"])
    written = {each.text: each.attrib for each in root if each.tag.endswith("text")}
    for text, place in written.items():
        room = len(text or "") * 7.2
        left = {"end": room, "middle": room / 2}.get(place.get("text-anchor", ""), 0.0)
        assert float(place["x"]) - left >= 0
        assert float(place["x"]) - left + room <= wide, text
    assert {"0", "100ms", "1s"} <= set(written)


def test_what_is_done_while_guests_stand_still_is_blackout() -> None:
    shown: list[HandoffReport] = []
    progress = Progress(REPORT, shown.append)
    for id in ("check", "place", "save", "place"):
        progress.phase(id, id)
    assert [phase.blackout for phase in shown[-1].phases] == [False, False, True, True]


def test_what_a_guest_says_of_itself_counts() -> None:
    (guest,) = whole().guests
    assert (guest.blackout_ns, guest.by) == (800 * MS, "guest")


DEVICE = CarriedDevice(
    "0000:00:04.0", "web", 256, 3, "kernel", "rebuilt", 40 * MS, 960 * MS, True, "PRESERVE_FD: ENOENT"
)


def test_a_device_is_in_the_picture_from_quiet_to_back() -> None:
    made = replace(whole(), devices=(DEVICE,))
    line = timeline.lines(made, 150)[-1]
    assert line.count("~") == 46  # 920 of 1000 ms in 50 cells
    assert "quiet 920" in line
    assert timeline.device(DEVICE) == ("rebuilt, 1M of IOVA in 3 runs, every IOVA where it was: PRESERVE_FD: ENOENT")
    assert ET.fromstring(timeline.svg(made)).tag.endswith("svg")


def test_a_guest_whose_devices_are_not_back_is_not_back() -> None:
    (guest,) = report.held(whole(), {"web"}).guests
    assert (guest.back, guest.blackout_ns) == (False, None)
    assert "devices" in guest.why
    assert "IOVA DIFFER" in timeline.device(replace(DEVICE, same=False))
    assert "NOT BACK (by the ledger)" in timeline.device(replace(DEVICE, same=None, source="ledger"))


def test_guests_of_memory_that_is_not_what_it_was_are_named() -> None:
    grants = [
        Grant(f"g{number}", region, guest, 0, 4096, Access.RW, GrantState.MAPPED)
        for number, (region, guest) in enumerate([("fine", "a"), ("moved", "b"), ("other", "c"), ("fine", "c")])
    ]
    regions = (
        Kept("fine", 4096, 1, same=True, contents=True),
        Kept("moved", 4096, 1, same=False),
        Kept("other", 4096, 1, same=True, contents=False),
        Kept("unseen", 4096, 1),
    )
    assert report.spoiled(replace(REPORT, regions=regions), grants) == {"b", "c"}
    assert report.spoiled(REPORT, grants) == set()
