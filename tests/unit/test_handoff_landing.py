"""The other side of a jump: each outcome as ledger, report and custody have it, and what an end before it leaves."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace as but
from support import handoffs
from support.desks import M, grant, guest
from support.handoffs import BDF, BOOT, Desk, Played, Vmm, refused, two_guests

from memconsole.actions import HandoffAction, HandoffRehearse, HandoffRun
from memconsole.backend import steps
from memconsole.backend.handoff import bootplan, landing, sequence, stored
from memconsole.backend.handoff.bootplan import Mismatch
from memconsole.backend.handoff.landing import Landing
from memconsole.backend.ledger.state import Intent, StateChange
from memconsole.errors import BadFile, Gone, NotFound
from memconsole.model import (
    GuestKind,
    GuestState,
    HandoffState,
    Quarantine,
    RegionResult,
    RegionState,
    Severity,
)

RUN, REHEARSE = HandoffRun(), HandoffRehearse()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


def handed_off(desk: Desk, action: HandoffAction = RUN) -> None:
    """Run the handoff up to the jump, and be in the next kernel: who lived is gone, custody has what was to be held."""
    played = Played(desk)
    work = sequence.made_of(desk, action, handoffs.seen(desk, played, action), played)
    assert work.refusals == []
    desk.carry(steps.run("handoff-run", work.steps))
    handoffs.next_kernel(desk)


def taken_over(desk: Desk) -> Landing:
    """What a control process does behind a jump: the ledger learns of it, guests are taken hold of, the rest is due."""
    landed = landing.land(desk)
    desk.change(landed.change)
    for each in desk.state.guests.values():
        if each.pid is not None:
            desk.adopt_guest(each)
    landing.reconcile(desk, landed)
    return landed


def outcome(desk: Desk) -> dict[str, bool]:
    assert desk.handoff is not None
    return {each.name: each.back for each in desk.handoff.guests}


# --- what came over -------------------------------------------------------------------------------------------------


def test_all_is_back_where_it_was(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(["web", "vm"], mode="luo")
    landed = taken_over(desk)
    assert landed.findings == []
    assert desk.state.boot == BOOT
    assert {each.state for each in desk.state.regions.values()} == {RegionState.RESTORED}
    assert {each.name: each.pid for each in desk.state.guests.values()} == {"web": 6000, "vm": 6001}
    made = desk.handoff
    assert made is not None
    assert made.state is HandoffState.DONE
    assert outcome(desk) == {"web": True, "vm": True}
    assert all(each.by == "its VMM" and each.blackout_ns is not None for each in made.guests)
    assert {each.name: each.same for each in made.regions} == {"web": True, "vm": True, "old": True}
    ids = [phase.id for phase in made.phases]
    assert ids[-7:] == ["jump", "boot", "planned", "verified", "started", "finished", "adopt"]
    assert [phase.start_ns <= (phase.end_ns or 0) for phase in made.phases] == [True] * len(ids)
    left = {name for name in desk.custody.names() if not name.startswith("region:")}
    assert left == {"ledger", "manifest", "report", "landed"}
    assert not landing.has_landed(desk)


def test_a_region_that_did_not_come_over_is_no_restored_one_and_is_said(desk: Desk) -> None:
    handed_off(desk)
    desk.custody.drop("region:old:0")
    desk.close_fds("old")
    desk.resumed(
        ["web", "vm"], mode="luo", findings=(Mismatch("lost", "region:old:0", "token 1 of session memconsole:=old"),)
    )
    landed = taken_over(desk)
    assert desk.state.regions["old"].state is RegionState.RESERVED
    assert desk.state.regions["web"].state is RegionState.RESTORED
    (lost,) = landed.findings
    assert (lost.id, lost.severity, lost.subject) == ("handoff-lost", Severity.ERROR, "region:old:0")
    assert desk.handoff is not None
    assert {each.name: each.same for each in desk.handoff.regions} == {"web": True, "vm": True, "old": False}
    assert desk.handoff.notes == ("region:old:0: token 1 of session memconsole:=old",)


def test_a_region_of_another_size_is_not_taken_for_the_one_that_was(desk: Desk) -> None:
    handed_off(desk)
    desk.keep("region:old:0", b"a page")
    desk.resumed(["web", "vm"], mode="luo")
    assert {each.name for each in landing.land(desk).change.regions} == {"web", "vm"}


def test_pages_in_other_frames_are_an_error_and_no_guest_is_told(desk: Desk) -> None:
    handed_off(desk)
    desk.frames["web"] += 7
    desk.resumed(["web", "vm"], mode="luo", findings=(Mismatch("pages-moved", "region:vm:0", "elsewhere"),))
    landed = taken_over(desk)
    assert {(each.id, each.subject) for each in landed.findings} == {
        ("handoff-pages-moved", "web"),
        ("handoff-pages-moved", "vm"),
        ("handoff-pages-moved", "region:vm:0"),
    }
    assert landed.moved == {"region:vm:0"}


@pytest.mark.parametrize("spoiled", [False, True])
def test_guests_whose_contents_are_compared_go_on_once_they_are_what_they_were(desk: Desk, spoiled: bool) -> None:
    handed_off(desk, HandoffRun(contents=True))
    if spoiled:
        os.pwrite(desk.fds("web")[0], b"spoiled", 0)
    desk.on_return = {"web": GuestState.PAUSED, "vm": GuestState.PAUSED}
    desk.resumed(["web", "vm"], mode="luo")
    landed = taken_over(desk)
    assert landed.waiting == {"web", "vm"}
    assert desk.lives("vm").did == ["resume"]
    assert desk.lives("web").did == ([] if spoiled else ["resume"])
    assert [each.id for each in landed.findings] == (["handoff-contents"] if spoiled else [])
    assert desk.handoff is not None
    assert {each.name: each.contents for each in desk.handoff.regions}["web"] is not spoiled


def test_a_guest_whose_state_is_spoiled_stays_in_custody_and_is_gone(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(
        ["web", "vm"], stuck=frozenset({"web"}), mode="luo", findings=(Mismatch("guest-held", "web", "it is"),)
    )
    landed = taken_over(desk)
    assert landed.findings == []  # it is a finding as long as it waits, of the control process's own
    assert (desk.state.guests["web"].pid, desk.state.guests["web"].state) == (None, GuestState.GONE)
    assert outcome(desk) == {"web": False, "vm": True}
    assert desk.handoff is not None
    assert desk.handoff.guests[0].why == "its state cannot be read"
    assert "state:web" in desk.custody.names()
    assert "state:vm" not in desk.custody.names()


def test_a_guest_that_the_plan_did_not_start_is_gone_too(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(["vm"], mode="luo")
    taken_over(desk)
    assert desk.state.guests["web"].state is GuestState.GONE
    assert desk.handoff is not None
    assert desk.handoff.guests[0].why == "its VMM was not started"


def test_a_guest_that_does_not_go_on_is_logged_once_and_the_others_do(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memconsole.steps")
    handed_off(desk, HandoffRun(contents=True))
    desk.on_return = {"web": GuestState.PAUSED, "vm": GuestState.PAUSED}
    desk.resumed(["web", "vm"], mode="luo")
    landed = landing.land(desk)
    desk.change(landed.change)
    for each in desk.state.guests.values():
        desk.adopt_guest(each)
    desk.lives("web").fails["resume"] = refused("resume")
    landing.reconcile(desk, landed)
    assert desk.lives("vm").did == ["resume"]
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("suppressed")]
    assert len(told) == 1
    assert 'during="web goes on"' in told[0]
    assert "resume cannot be done" in told[0]


# --- what cannot be read --------------------------------------------------------------------------------------------


def test_without_a_record_or_with_a_broken_one_nothing_lands(desk: Desk) -> None:
    handed_off(desk)
    with pytest.raises(NotFound):
        landing.land(desk)
    desk.keep(bootplan.RESUME, b"{")
    with pytest.raises(BadFile):
        landing.land(desk)
    assert landing.has_landed(desk)
    desk.keep(bootplan.RESUME, b'{"version":9,"mode":"luo","phases":[],"guests":[],"held":[],"findings":[]}')
    with pytest.raises(BadFile) as other:
        landing.land(desk)
    assert "version 9" in other.value.why


def test_without_a_manifest_the_ledger_says_who_was_saved_and_the_report_that_it_is_not_known(desk: Desk) -> None:
    handed_off(desk)
    desk.keep(bootplan.MANIFEST, b"no manifest")
    desk.resumed(["web", "vm"], mode="luo")
    landed = taken_over(desk)
    assert [each.id for each in landed.findings] == ["manifest-unknown"]
    assert landed.waiting == frozenset()
    assert outcome(desk) == {"web": True, "vm": True}
    assert desk.handoff is not None
    assert "the manifest cannot be read" in desk.handoff.notes[0]
    assert {each.state for each in desk.state.regions.values()} == {RegionState.RESTORED}


def test_what_the_early_path_found_is_a_finding_of_its_kind(desk: Desk) -> None:
    handed_off(desk)
    found = (
        Mismatch("device-busy", "/dev/liveupdate", "process 9 had it open"),
        Mismatch("name-taken", "region:web:0", "kept as another"),
        Mismatch("plan-broken", "manifest", "no guest is started"),
        Mismatch("another-kind", "web", "a newer one wrote it"),
    )
    desk.resumed(["web", "vm"], mode="luo", findings=found)
    landed = landing.land(desk)
    assert [(each.id, each.severity) for each in landed.findings] == [
        ("handoff-device-busy", Severity.WARNING),
        ("handoff-name-taken", Severity.WARNING),
        ("handoff-plan-broken", Severity.ERROR),
        ("handoff-another-kind", Severity.ERROR),
    ]
    assert all(each.remedy for each in landed.findings)


def test_what_ended_with_the_kernel_before_is_known_no_more(desk: Desk) -> None:
    handed_off(desk)
    lazy = but(desk.state.grants["g1"], lazy=True)
    desk.change(StateChange(grants=(lazy,), quarantine=(Quarantine("q1", "web", "db", M, 1, ""),)))
    desk.resumed(["web", "vm"], mode="luo")
    landed = taken_over(desk)
    assert desk.state.quarantine == {}
    assert not desk.state.grants["g1"].lazy
    assert landed.report.notes == ("g1: web had it lazily; the kernel serves its faults from now on",)


# --- once more ------------------------------------------------------------------------------------------------------


def test_who_is_interrupted_before_the_end_does_it_again_and_compares_once(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(["web", "vm"], mode="luo")
    record = desk.content(bootplan.RESUME)
    first = taken_over(desk)
    assert desk.handoff is not None
    regions = desk.handoff.regions
    desk.keep(bootplan.RESUME, record)
    desk.handoff = stored.stored_report(desk)
    desk.frames["web"] += 7  # guests run since: pages may be anywhere
    landing.reconcile(desk, first)
    assert desk.handoff is not None
    assert desk.handoff.regions == regions
    assert first.findings == []


# --- what is taken back ---------------------------------------------------------------------------------------------


def died_in(desk: Desk, action: HandoffRun | HandoffRehearse, until: str) -> Intent:
    """Run a handoff's steps up to and with one of them; no undo: the control process died."""
    played = Played(desk)
    work = sequence.made_of(desk, action, handoffs.seen(desk, played, action), played)
    for step in work.steps:
        step.do()
        if step.id == until:
            break
    else:
        raise AssertionError(until)
    intent = Intent(0, action, "hv1")
    desk.record(intent)
    return intent


def test_a_handoff_that_died_before_the_jump_is_taken_back_and_guests_go_on(desk: Desk) -> None:
    intent = died_in(desk, RUN, "manifest")
    played = Played(desk)
    assert landing.undo_handoff(desk, intent, played) == []
    assert [desk.lives(name).says for name in ("web", "vm")] == [GuestState.RUNNING] * 2
    left = {name for name in desk.custody.names() if not name.startswith("region:")}
    assert left == {"ledger"}
    assert played.did == ["unload"]


def test_a_rehearsal_that_died_unloads_nothing_and_a_paused_guest_stays_paused(desk: Desk) -> None:
    paused = but(desk.state.guests["vm"], state=GuestState.PAUSED)
    desk.change(StateChange(guests=(paused,)))
    desk.lives("vm").says = GuestState.PAUSED
    intent = died_in(desk, REHEARSE, "save-web")
    played = Played(desk)
    assert not landing.interrupted(desk, REHEARSE)
    assert landing.undo_handoff(desk, intent, played) == []
    assert played.did == []
    assert desk.lives("vm").says is GuestState.PAUSED
    assert desk.lives("web").says is GuestState.RUNNING


def test_a_suspended_guest_that_was_saved_is_ended_and_to_be_resumed(desk: Desk) -> None:
    desk.lives("vm").says = GuestState.SUSPENDED
    intent = died_in(desk, RUN, "save-vm")
    was = desk.lives("vm")
    assert landing.undo_handoff(desk, intent, Played(desk)) == ["vm"]
    assert was.did[-2:] == ["kill", "close"]
    assert "state:vm" in desk.custody.names()
    assert "state:web" not in desk.custody.names()


def test_what_cannot_be_taken_back_ends_nothing_and_each_is_logged(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memconsole.steps")
    intent = died_in(desk, RUN, "manifest")
    desk.address_spaces.quiesced.add(BDF)
    desk.address_spaces.fails["restart"] = refused("restart")
    desk.lives("web").fails["resume"] = refused("resume")
    assert landing.undo_handoff(desk, intent, Played(desk, fails={"unload": refused("unload")})) == []
    assert desk.lives("vm").says is GuestState.RUNNING
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("suppressed")]
    assert [line.partition(" error=")[0] for line in told] == [
        f'suppressed during="the bus is given back to device {BDF}"',
        'suppressed during="guest web runs again where it was"',
        'suppressed during="the image is unloaded"',
    ]


def test_processes_and_guests_that_are_gone_are_not_touched(desk: Desk) -> None:
    desk.change(StateChange(guests=(guest("db"),)))
    desk.add_guest(Vmm("db", GuestKind.PROCESS))
    intent = died_in(desk, RUN, "pause-web")
    desk.remove_guest("vm")
    landing.undo_handoff(desk, intent, Played(desk))
    assert desk.lives("db").did == []
    assert desk.lives("web").did == ["pause", "resume"]


# --- a rehearsal that is carried on ---------------------------------------------------------------------------------


def test_a_rehearsal_that_died_once_it_had_ended_a_vmm_is_carried_on(desk: Desk) -> None:
    died_in(desk, REHEARSE, "end")
    assert landing.interrupted(desk, REHEARSE)
    assert not landing.interrupted(desk, RUN)
    played = Played(desk)
    landed = landing.carry_on(desk, played)
    assert played.did == ["revive manifest"]
    assert {each.name: each.pid for each in landed.change.guests} == {"web": 6000, "vm": 6001}
    landing.adopt_processes(desk, landed.change.guests)
    assert desk.lives("web").pid == 6000


def test_a_guest_that_ends_as_it_is_taken_hold_of_is_gone(desk: Desk) -> None:
    class Ended(Desk):
        def adopt_guest(self, guest: object, *, windows: bool = True) -> Vmm:
            raise Gone("it ended", "", "")

    desk.__class__ = Ended
    landing.adopt_processes(desk, [desk.state.guests["web"]])
    assert desk.live_guest("web") is None


def test_the_rehearsals_record_says_it_was_one_and_keeps_inodes_and_quarantine(desk: Desk) -> None:
    died_in(desk, REHEARSE, "early")
    desk.change(StateChange(quarantine=(Quarantine("q1", "web", "db", M, 1, ""),)))
    landed = landing.land(desk)
    assert landed.report.kind == "rehearse"
    assert landed.change.without_quarantine == ()
    assert {each.state for each in landed.change.regions} == {RegionState.RESERVED}


# --- devices behind a jump ------------------------------------------------------------------------------------------


def test_vmms_that_wait_for_their_devices_are_named_unless_their_memory_is_spoiled(tmp_path: Path) -> None:
    grants = (grant("g1", "web", "web", gpa=0), grant("g2", "vm", "vm", gpa=0, dma=BDF))
    with two_guests(tmp_path, grants=grants) as desk:
        assert landing.start_waiting_guests(desk) == []
        desk.address_spaces.devices[BDF] = "vm"
        desk.tree.pci(BDF, ids=(0x1234, 0x11E8), class_code=0xFF0000, driver="vfio-pci", group=7)
        handed_off(desk)
        assert landing.start_waiting_guests(desk) == ["vm"]
        described, _ = stored.stored_manifest(desk)
        assert described is not None
        desk.handoff = but(described.report, regions=(RegionResult("vm", 4 * M, 1, same=False),))
        assert landing.start_waiting_guests(desk) == []
        desk.handoff = None
        desk.keep(bootplan.MANIFEST, b"none")
        assert landing.start_waiting_guests(desk) == []
