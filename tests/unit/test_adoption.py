"""What a start takes over of custody, ledger and guests: each outcome, and how what was under way is ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace as but
from support import handoffs
from support.desks import M, grant, guest, region
from support.handoffs import BDF, BOOT, Desk, Played, Vmm, refused, two_guests
from support.waiting import until

from memconsole import actions
from memconsole.actions import HandoffRehearse, HandoffRun
from memconsole.backend import adoption
from memconsole.backend.custody import payloads
from memconsole.backend.handoff import bootplan, sequence
from memconsole.backend.handoff.bootplan import Mismatch
from memconsole.backend.ledger.state import DoneRecord, EventRecord, FailedRecord, Intent, StateChange
from memconsole.errors import Gone, KernelRefused
from memconsole.model import (
    Finding,
    GrantState,
    GuestKind,
    GuestState,
    HandoffState,
    RegionState,
    Segment,
    Severity,
)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


def adopted(desk: Desk, played: Played | None = None) -> list[Finding]:
    """Start a control process on what there is: it has no region's descriptor yet."""
    for name in list(desk.state.regions):
        desk.close_fds(name)
    desk.records.clear()
    found: list[Finding] = desk.carry(adoption.adopt_all(desk, played or Played(desk)))
    return found


def under_way(desk: Desk, action: actions.Action, subject: str = "web", aims: StateChange = StateChange()) -> None:  # noqa: B008
    desk.record(Intent(0, action, subject, "", aims))  # type: ignore[arg-type]


def ended(desk: Desk) -> DoneRecord | FailedRecord:
    """How the action that was under way ended."""
    (found,) = [each for each in desk.records if isinstance(each, (DoneRecord, FailedRecord))]
    return found


def ids(found: list[Finding]) -> list[tuple[str, str]]:
    return [(each.id, each.subject) for each in found]


# --- regions --------------------------------------------------------------------------------------------------------


def test_what_is_in_ledger_and_custody_is_taken_over_without_a_word(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memconsole.steps")
    assert adopted(desk) == []
    assert desk.records == []
    assert {name: desk.holds_region(name) for name in desk.state.regions} == {"web": True, "vm": True, "old": True}
    said = [record.getMessage().partition(" seconds=") for record in caplog.records]
    assert [line for line, _, _ in said] == [
        f"step action=adopt step={step} state=passed"
        for step in ("begun", "stores", "landed", "regions", "guest.web", "guest.vm", "moves", "settled", "done")
    ]
    assert all(float(seconds) >= 0 for _, _, seconds in said)


def test_a_region_that_custody_lacks_stays_lost_and_one_of_which_a_part_is_left_is_told(desk: Desk) -> None:
    desk.custody.drop("region:old:0")
    torn = but(desk.state.regions["vm"], segments=(*desk.state.regions["vm"].segments, Segment(9, 9, M)))
    desk.change(StateChange(regions=(torn,)))
    found = adopted(desk)
    assert ids(found) == [("region-torn", "vm")]
    assert "1 of the 2 segments" in found[0].observed
    assert {name: desk.holds_region(name) for name in desk.state.regions} == {"web": True, "vm": False, "old": False}
    assert "region:vm:0" in desk.custody.names()


def test_other_memory_under_a_regions_name_is_taken_for_the_region_and_told(desk: Desk) -> None:
    desk.keep("region:old:0", bytes(8192))
    found = adopted(desk)
    assert ids(found) == [("custody-other", "old")]
    assert desk.state.regions["old"].size == 8192
    assert desk.state.regions["old"].segments[0].inode == os.fstat(desk.fds("old")[0]).st_ino
    (record,) = desk.records
    assert isinstance(record, EventRecord)
    assert adopted(desk) == []  # the ledger knows by then


def test_a_region_that_only_custody_has_is_taken_over_with_what_a_newer_one_said_of_it(desk: Desk) -> None:
    known = region("found", 2 * M)
    payload = msgspec.json.encode(known)[:-1] + b',"later":{"a":1}}'
    desk.keep("region:found:0", bytes(8192), payload)
    found = adopted(desk)
    assert ids(found) == [("region-found", "found")]
    assert (desk.state.regions["found"].size, desk.state.regions["found"].state) == (8192, RegionState.RESERVED)
    assert desk.holds_region("found")
    assert desk.state.rests["regions", "found"] == {"later": {"a": 1}}


@pytest.mark.parametrize(
    ("names", "payload"),
    [
        (["region:x:0"], b"{"),
        (["region:x:1"], msgspec.json.encode(region("x"))),
        (["region:x:0", "region:x:2"], msgspec.json.encode(region("x"))),
    ],
)
def test_what_is_no_whole_region_is_kept_as_it_is_and_told(desk: Desk, names: list[str], payload: bytes) -> None:
    for name in names:
        desk.keep(name, b"", payload)
    assert ids(adopted(desk)) == [("custody-unknown", "x")]
    assert set(names) < set(desk.custody.names())
    assert "x" not in desk.state.regions


def test_a_kind_that_is_not_known_here_is_kept_and_told(desk: Desk) -> None:
    desk.keep("later:1")
    assert ids(adopted(desk)) == [("custody-unknown", "later")]
    assert "later:1" in desk.custody.names()
    assert "later" not in payloads.KINDS


def test_a_report_that_cannot_be_read_is_kept_and_told(desk: Desk) -> None:
    desk.keep("report", b"{")
    assert ids(adopted(desk)) == [("custody-unknown", "report")]
    assert desk.handoff is None


# --- guests ---------------------------------------------------------------------------------------------------------


def test_a_guest_whose_process_ended_is_logged_once_and_the_others_are_taken_over(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memconsole.steps")

    class Ended(Desk):
        def adopt_guest(self, guest: object, *, windows: bool = True) -> Vmm:
            if getattr(guest, "name", "") == "web":
                raise Gone("the process of guest web ended", "", "")
            return super().adopt_guest(guest, windows=windows)  # type: ignore[arg-type]

    desk.remove_guest("web")
    desk.__class__ = Ended
    assert adopted(desk) == []
    assert desk.live_guest("web") is None
    assert desk.live_guest("vm") is not None
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        'suppressed action=adopt during="guest web is taken over" error=Gone why="the process of guest web ended"'
    ]


def test_behind_a_kexec_that_was_not_memconsoles_regions_are_known_again_and_guests_ended(desk: Desk) -> None:
    desk.change(StateChange(boot="another"))
    found = adopted(desk)
    assert ids(found) == [("kexec-foreign", "host")]
    assert {each.state for each in desk.state.regions.values()} == {RegionState.RESTORED}
    assert {(each.pid, each.state) for each in desk.state.guests.values()} == {(None, GuestState.GONE)}
    assert adopted(desk) == []


def test_devices_that_reach_too_much_are_told_and_the_service_starts(desk: Desk) -> None:
    desk.address_spaces.fails["settle"] = refused("unmapping")
    (found,) = adopted(desk)
    assert (found.id, found.severity) == ("devices-unsettled", Severity.ERROR)
    assert "unmapping cannot be done" in found.observed


# --- a handoff that landed ------------------------------------------------------------------------------------------


def handed_off(desk: Desk, action: HandoffRun = HandoffRun()) -> None:  # noqa: B008 - a value
    """The jump was made, and this is the next kernel: its ledger knows of a handoff under way."""
    played = Played(desk)
    work = sequence.made_of(desk, action, handoffs.seen(desk, played, action), played)
    under_way(desk, action, "hv1")
    for step in work.steps:
        step.do()
    handoffs.next_kernel(desk)


def test_a_handoff_that_landed_is_done_and_its_guests_are_taken_over(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(["web", "vm"], mode="luo")
    assert adopted(desk) == []
    done = ended(desk)
    assert isinstance(done, DoneRecord)
    assert done.text == "hv1 was handed off: 2 of 2 guests are back"
    assert desk.state.unfinished == {}
    assert desk.state.boot == BOOT
    assert (desk.lives("web").pid, desk.lives("vm").pid) == (6000, 6001)

    def clocks_known() -> bool:
        assert desk.handoff is not None
        return all(each.clock is not None for each in desk.handoff.guests)

    until(clocks_known, "the clocks of both guests are looked after")
    assert desk.handoff is not None
    assert desk.handoff.state is HandoffState.DONE
    assert {each.name: each.clock.note for each in desk.handoff.guests if each.clock} == {
        "web": "it has no wall clock; it counts gaps in its own time",
        "vm": "it has no channel for QEMU's guest agent",
    }
    assert adopted(desk) == []  # once more, and nothing is left to do
    assert desk.records == []


def test_a_guest_that_did_not_come_over_costs_itself_alone(desk: Desk) -> None:
    handed_off(desk)
    desk.resumed(["web", "vm"], stuck=frozenset({"vm"}), mode="luo", findings=(Mismatch("guest-held", "vm", "stuck"),))
    assert adopted(desk) == []
    done = ended(desk)
    assert isinstance(done, DoneRecord)
    assert done.text == "hv1 was handed off: 1 of 2 guests are back"
    assert desk.live_guest("vm") is None
    assert "state:vm" in desk.custody.names()


def test_a_landing_that_cannot_be_read_is_told_and_the_memory_is_kept(desk: Desk) -> None:
    handed_off(desk)
    desk.change(StateChange(boot="the boot before"))
    desk.keep(bootplan.RESUME, b"{")
    found = adopted(desk)
    assert ids(found) == [("handoff-unread", "handoff"), ("kexec-foreign", "host")]
    assert {"resume", "manifest", "state:web", "state:vm"} < set(desk.custody.names())
    assert len(desk.state.unfinished) == 1
    assert desk.holds_region("web")
    ended_of = {each.ended for each in desk.state.guests.values()}
    assert ended_of == {"ended with the kernel before: a handoff landed, and what became of it cannot be read"}
    desk.resumed(["web", "vm"], mode="luo")  # a memconsole that can read it
    assert adopted(desk) == []
    assert isinstance(ended(desk), DoneRecord)
    assert desk.lives("web").pid == 6000


def test_vmms_that_wait_for_their_devices_are_tried_and_what_fails_is_told(tmp_path: Path) -> None:
    grants = (grant("g1", "web", "web", gpa=0), grant("g2", "vm", "vm", gpa=0, dma=BDF))
    with two_guests(tmp_path, grants=grants) as desk:
        desk.address_spaces.devices[BDF] = "vm"
        desk.tree.pci(BDF, ids=(0x1234, 0x11E8), class_code=0xFF0000, driver="edu_host")
        desk.tree.link(f"/sys/bus/pci/devices/{BDF}/driver", "../../../../bus/pci/drivers/edu_host")
        handed_off(desk)
        desk.resumed(["web"], mode="luo")
        found = adopted(desk)
        assert ids(found) == [("action-unfinished", "vm")]
        assert "the kernel's edu_host has it" in found[0].observed
        assert [type(each) for each in desk.records] == [DoneRecord, Intent, FailedRecord]
        assert "state:vm" in desk.custody.names()


# --- a handoff that was under way -----------------------------------------------------------------------------------


def died_in(desk: Desk, action: actions.HandoffAction, until_step: str) -> None:
    played = Played(desk)
    work = sequence.made_of(desk, action, handoffs.seen(desk, played, action), played)
    under_way(desk, action, "hv1")
    for step in work.steps:
        step.do()
        if step.id == until_step:
            return
    raise AssertionError(until_step)


@pytest.mark.parametrize(
    "step", ["check", "load", "preserve-vm", "place", "pause-web", "save-web", "save-vm", "manifest"]
)
def test_a_handoff_cut_short_at_any_step_is_taken_back_and_every_guest_goes_on(desk: Desk, step: str) -> None:
    before = [name for name in desk.custody.names() if name != "report"]
    died_in(desk, HandoffRun(), step)
    played = Played(desk)
    assert adopted(desk, played) == []
    failed = ended(desk)
    assert isinstance(failed, FailedRecord)
    assert failed.code == "CutShort"
    assert [desk.lives(name).says for name in ("web", "vm")] == [GuestState.RUNNING] * 2
    assert desk.custody.names() == before
    assert played.did == ["unload"]


@pytest.mark.parametrize("step", ["end", "early"])
def test_a_rehearsal_that_had_ended_vmms_is_carried_on(desk: Desk, step: str) -> None:
    died_in(desk, HandoffRehearse(), step)
    played = Played(desk)
    assert adopted(desk, played) == []
    done = ended(desk)
    assert isinstance(done, DoneRecord)
    assert desk.lives("web").pid == 6000
    assert desk.lives("vm").pid == 6001
    assert desk.handoff is not None
    assert desk.handoff.state is HandoffState.DONE
    assert not {"resume", "state:web", "state:vm"} & set(desk.custody.names())


def test_a_rehearsal_that_cannot_be_carried_on_is_told_and_keeps_the_states(desk: Desk) -> None:
    died_in(desk, HandoffRehearse(), "end")
    found = adopted(desk, Played(desk, fails={"revive": refused("revive")}))
    assert ids(found) == [("action-unfinished", "hv1")]
    assert isinstance(ended(desk), FailedRecord)
    assert {"state:web", "state:vm", "manifest"} < set(desk.custody.names())


def test_a_suspended_guest_of_a_handoff_that_is_taken_back_is_resumed_from_what_was_saved(desk: Desk) -> None:
    desk.lives("vm").says = GuestState.SUSPENDED
    died_in(desk, HandoffRun(), "save-vm")
    found = adopted(desk)
    # it was tried, as an action of its own; there is no keeper here from which it could be started
    assert [type(each) for each in desk.records] == [FailedRecord, Intent, FailedRecord]
    assert ids(found) == [("action-unfinished", "vm")]
    assert "state:vm" in desk.custody.names()


# --- a guest that was started alone ---------------------------------------------------------------------------------


def test_a_guest_that_was_started_alone_is_known_and_goes_on(desk: Desk) -> None:
    desk.remove_guest("web")
    desk.keep("state:web")
    desk.on_return = {"web": GuestState.PAUSED}
    under_way(desk, actions.GuestResume("web"))
    desk.resumed(["web"])
    assert adopted(desk) == []
    assert [type(each) for each in desk.records] == [DoneRecord, Intent, DoneRecord]
    assert (desk.lives("web").pid, desk.lives("web").says) == (6000, GuestState.RUNNING)
    assert not {"state:web", "resume"} & set(desk.custody.names())


def test_one_that_runs_already_is_not_asked_again_and_one_that_did_not_start_stays(desk: Desk) -> None:
    desk.remove_guest("web")
    desk.keep("state:web")
    under_way(desk, actions.GuestResume("web"))
    desk.resumed(["web"])
    assert adopted(desk) == []
    assert [type(each) for each in desk.records] == [DoneRecord]
    desk.remove_guest("web")
    desk.keep("state:web")
    under_way(desk, actions.GuestResume("web"))
    desk.resumed(["web"], stuck=frozenset({"web"}))
    adopted(desk)
    failed = ended(desk)
    assert isinstance(failed, FailedRecord)
    assert "did not come back" in failed.text
    assert "state:web" in desk.custody.names()


# --- other actions that were under way ------------------------------------------------------------------------------


def test_a_release_is_carried_through(desk: Desk) -> None:
    under_way(desk, actions.Release("old"), "old")
    assert adopted(desk) == []
    done = ended(desk)
    assert isinstance(done, DoneRecord)
    assert done.text.endswith("(carried through after a restart)")
    assert "old" not in desk.state.regions
    assert "region:old:0" not in desk.custody.names()


def test_what_is_refused_by_now_failed_and_what_fails_is_told(desk: Desk) -> None:
    under_way(desk, actions.GuestPause("nobody"), "nobody")
    assert adopted(desk) == []
    failed = ended(desk)
    assert isinstance(failed, FailedRecord)
    assert failed.code
    desk.lives("vm").fails["pause"] = KernelRefused("ioctl", 5, what="vm does not answer")
    under_way(desk, actions.GuestPause("vm"), "vm")
    found = adopted(desk)
    assert ids(found) == [("action-unfinished", "vm")]
    assert "cannot be finished: vm does not answer" in found[0].observed
    assert found[0].remedy == "try again: memconsole guest pause vm"


def test_a_reservation_and_a_start_are_taken_back(desk: Desk) -> None:
    desk.keep("region:new:0", bytes(4096), b"{}")
    under_way(desk, actions.Reserve("new", M), "new")
    assert adopted(desk) == []
    assert isinstance(ended(desk), FailedRecord)
    assert "region:new:0" not in desk.custody.names()
    desk.keep("region:vm2:0", bytes(4096), b"{}")
    under_way(desk, actions.GuestStart("vm2", memory=M), "vm2")
    assert adopted(desk) == []
    assert "region:vm2:0" not in desk.custody.names()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_grant_is_taken_back_from_devices_and_stays_where_its_guest_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    monkeypatch.setattr(adoption, "OFFER_S", 0.05)
    looks: tuple[tuple[int, ...], ...] = ((4000,),) if keeps else ((4000,), ())
    live = (Vmm("web", pid=os.getpid()), Vmm("vm", GuestKind.QEMU, 4002, ram="g2"))
    with two_guests(tmp_path, reaching=looks, live=live, guests=(handoffs.vm("web", pid=os.getpid()),)) as desk:
        made = but(grant("g9", "old", "web", dma=BDF), state=GrantState.OFFERED)
        desk.address_spaces.mapped.add("g9")
        under_way(desk, actions.Map("old", "web"), "g9", StateChange(grants=(made,)))
        assert adopted(desk) == []
        assert desk.address_spaces.mapped == set()
        if keeps:
            assert isinstance(ended(desk), DoneRecord)
            assert (desk.state.grants["g9"].state, desk.state.grants["g9"].dma) == (GrantState.MAPPED, None)
        else:
            assert isinstance(ended(desk), FailedRecord)
            assert "g9" not in desk.state.grants


def test_a_grant_of_a_guest_that_is_gone_is_taken_back_without_a_look(desk: Desk) -> None:
    under_way(desk, actions.Map("old", "db"), "g9", StateChange(grants=(grant("g9", "old", "db"),)))
    assert adopted(desk) == []
    assert isinstance(ended(desk), FailedRecord)
    assert desk.looks == 0


def test_a_guest_of_the_ledger_without_a_process_is_let_be(desk: Desk) -> None:
    desk.change(StateChange(guests=(guest("db", pid=None, state=GuestState.GONE),)))
    assert adopted(desk) == []
    assert desk.live_guest("db") is None
