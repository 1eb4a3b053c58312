"""Manifest, report and timeline: what is written is what is read, and what is broken is named."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from memconsole import timeline
from memconsole.backend.handoff import bootplan, clocks, manifest, report
from memconsole.backend.handoff.bootplan import BootPlan, ClockReading, Hold, Resume, Resumed, ResumePhase
from memconsole.backend.handoff.manifest import Manifest, PreservedRegion, SavedGuest
from memconsole.backend.handoff.report import Clock, ReportWriter
from memconsole.errors import BadFile
from memconsole.model import (
    Access,
    DeviceResult,
    Grant,
    GrantState,
    Guest,
    GuestClock,
    GuestKind,
    GuestResult,
    GuestState,
    HandoffReport,
    HandoffState,
    Region,
    RegionResult,
    RegionState,
    Segment,
)

MS = 1_000_000
GUEST = Guest("web", GuestKind.CANARY, GuestState.RUNNING, 7, 8, memory=64 << 20)
REGION = Region("web", "memfd", 64 << 20, 4096, RegionState.RESERVED, segments=(Segment(1, 2, 64 << 20),))
REPORT = HandoffReport(
    "run", HandoffState.RUNNING, 10**18, "7.3.4", "7.3.5", guests=(GuestResult("web", GuestKind.CANARY, 64 << 20),)
)


def at(ms: float, ticks: int = 0) -> ClockReading:
    return ClockReading(ticks or int(ms * 1000) + 1, int(ms * MS), 10**18 + int(ms * MS))


def described() -> Manifest:
    return Manifest(
        tool="memconsole 0",
        kernel="7.3.4",
        boot_id="b",
        command_line="kho=on",
        number=3,
        began=at(0),
        written=at(100),
        regions=(PreservedRegion(REGION, "memconsole:web", (1,), ("00" * 16,), 5, 1000),),
        guests=(SavedGuest(GUEST, "state:web", at(60)),),
        grants=(),
        windows=(),
        report=REPORT,
    )


PLAN = BootPlan((Hold("memconsole:web", 1, "region:web:0", b"{}"),))


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
    progress = ReportWriter(REPORT, shown.append)
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
    back = ClockReading(2_060_001, 500 * MS, 10**18)
    resume = Resume(1, "luo", (ResumePhase("begun", back),), (Resumed("web", "started", 9, 10, at=back),), (), ())
    clock = Clock(at(0), [(at(0), at(100))])
    (carried,) = report.guest_results(REPORT.guests, described(), resume, clock)
    assert carried.back
    assert carried.pid == 9
    assert carried.blackout_ns == 2_000 * MS


def test_a_guest_that_is_held_has_no_blackout_and_says_why() -> None:
    resume = Resume(1, "luo", (), (Resumed("web", "held", why="no fd"),), (), ())
    (carried,) = report.guest_results(REPORT.guests, described(), resume, Clock(at(0), []))
    assert (carried.back, carried.blackout_ns, carried.why) == (False, None, "no fd")


def adopted(found: Resumed) -> GuestResult:
    """What the report says of an adopted guest that the boot plan was to start, and that stood still 5 ms before."""
    guests = (GuestResult("web", GuestKind.FOREIGN, 1, why="libvirt has not started it", lane="before libvirt"),)
    mine = replace(described(), guests=(SavedGuest(GUEST, "fast:web", at(60), stood_ns=5 * MS),))
    (result,) = report.guest_results(guests, mine, Resume(1, "luo", (), (found,), (), ()), Clock(at(0), []))
    return result


def test_an_adopted_guest_that_the_boot_plan_started_is_back() -> None:
    result = adopted(Resumed("web", "resumed", 9, 10, at=at(1_060), told=True))
    assert (result.back, result.pid, result.by, result.why, result.lane) == (True, 9, "its VMM", "", "before libvirt")
    assert result.blackout_ns == 1_005 * MS


def test_an_adopted_guest_that_the_boot_plan_did_not_start_waits_for_libvirt_and_says_why() -> None:
    result = adopted(Resumed("web", "held", why="its disk is not there"))
    assert (result.back, result.why) == (False, "libvirt has not started it")
    assert result.lane.endswith("memconsole-resume did not start it: its disk is not there")


def test_an_adopted_guest_that_went_on_and_ended_waits_for_nobody() -> None:
    result = adopted(Resumed("web", "held", why="its VMM has ended", told=True))
    assert (result.back, result.why) == (False, "its VMM has ended")


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
        guests=(GuestResult("web", GuestKind.CANARY, 1, back=True, blackout_ns=900 * MS, by="guest"),),
    )
    return report.with_blackouts(done, [("web", 800 * MS)])


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
    progress = ReportWriter(REPORT, shown.append)
    for id in ("check", "place", "save", "place"):
        progress.phase(id, id)
    assert [phase.blackout for phase in shown[-1].phases] == [False, False, True, True]


def test_what_a_guest_says_of_itself_counts() -> None:
    (guest,) = whole().guests
    assert (guest.blackout_ns, guest.by) == (800 * MS, "guest")


DEVICE = DeviceResult(
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
    (guest,) = report.with_waiting(whole(), {"web"}).guests
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
        RegionResult("fine", 4096, 1, same=True, contents=True),
        RegionResult("moved", 4096, 1, same=False),
        RegionResult("other", 4096, 1, same=True, contents=False),
        RegionResult("unseen", 4096, 1),
    )
    assert report.spoiled_guests(replace(REPORT, regions=regions), grants) == {"b", "c"}
    assert report.spoiled_guests(REPORT, grants) == set()


VM = GuestResult("vm", GuestKind.QEMU, 1, back=True, blackout_ns=900 * MS, by="its VMM")
LATE = "late by 900.0ms until something in the guest sets it"


@pytest.mark.parametrize(
    ("clock", "said"),
    [
        (None, "not known yet"),
        (
            GuestClock(note="it has no channel"),
            f"{LATE}: it has no channel",
        ),
        (
            GuestClock(9900 * MS, 2 * MS, "its agent set the clock"),
            "it was 9.9s late, and is right: its agent set the clock",
        ),
        (GuestClock(9900 * MS, 9900 * MS, "refused"), "it was 9.9s late, and is 9.9s late: refused"),
        (
            GuestClock(-2000 * MS, 0, "its agent set the clock"),
            "it was 2.0s ahead, and is right: its agent set the clock",
        ),
        (
            GuestClock(note="no agent", sources=("kvmclock", "vmclock", "one of a newer memconsole")),
            f"{LATE}: no agent; its kvmclock continues from where it stood; its vmclock reports the break",
        ),
    ],
)
def test_what_became_of_a_guests_wall_clock(clock: GuestClock | None, said: str) -> None:
    assert timeline.clock(replace(VM, clock=clock)) == said
    assert timeline.clock(replace(VM, clock=clock, back=False)) == ""


def test_what_is_told_of_a_clock_goes_into_its_own_report() -> None:
    made = replace(whole(), guests=(*whole().guests, VM))
    clock = GuestClock(note="its agent set the clock")
    _, vm = clocks.with_clock(made, began_ns=made.began_ns, name="vm", clock=clock).guests
    assert vm.clock == clock
    assert clocks.with_clock(made, began_ns=2, name="vm", clock=clock) == made
