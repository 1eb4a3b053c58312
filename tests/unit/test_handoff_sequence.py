"""The steps of a handoff and of a rehearsal: what each leaves, and that a failure at any of them leaves nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as but
from support import handoffs
from support.desks import M, grant, guest
from support.handoffs import BDF, Desk, Played, Vmm, refused, two_guests
from support.trees import BOOT_ID

from memconsole.actions import GuestResume, HandoffAction, HandoffRehearse, HandoffRun
from memconsole.backend import steps
from memconsole.backend.handoff import bootplan, manifest, sequence
from memconsole.backend.ledger.state import StateChange, WindowGrant
from memconsole.backend.work import PreparedAction
from memconsole.errors import MemconsoleError, NotFound
from memconsole.extents import digest_fd
from memconsole.model import GuestKind, GuestState, HandoffState, Survival, Window

RUN, REHEARSE = HandoffRun(), HandoffRehearse()
WINDOW = Window(f"{BDF}:0", BDF, 0, 0xFE000000, 1 << 12)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


@pytest.fixture
def played(desk: Desk) -> Played:
    return Played(desk)


@pytest.fixture
def with_device(tmp_path: Path) -> Iterator[Desk]:
    """The canary has a device and a window of it."""
    more = (grant("g1", "web", "web", gpa=0, dma=BDF), grant("g2", "vm", "vm", gpa=0))
    given = WindowGrant("g3", WINDOW.id, "web", 0)
    with two_guests(tmp_path, grants=more, windows=(WINDOW,), window_grants=(given,)) as made:
        made.address_spaces.devices[BDF] = "web"
        made.tree.pci(BDF, ids=(0x1234, 0x11E8), class_code=0xFF0000, driver="vfio-pci", group=7)
        yield made


def planned(desk: Desk, played: Played, action: HandoffAction) -> PreparedAction:
    work = sequence.made_of(desk, action, handoffs.seen(desk, played, action), played)
    assert work.refusals == []
    return work


def done(desk: Desk, played: Played, action: HandoffAction) -> PreparedAction:
    work = planned(desk, played, action)
    desk.carry(steps.run(action.spec.id, work.steps))
    return work


def read(desk: Desk) -> manifest.Manifest:
    return manifest.read(desk.content(bootplan.MANIFEST))


def plan(desk: Desk) -> bootplan.BootPlan:
    return bootplan.decode(desk.content(bootplan.MANIFEST))


# --- a handoff ------------------------------------------------------------------------------------------------------


def test_a_handoff_preserves_a_session_a_guest_while_guests_run_and_jumps_last(desk: Desk, played: Played) -> None:
    work = done(desk, played, RUN)
    assert [step.id for step in work.steps] == [
        *("check", "load", "preserve-web", "preserve-vm", "preserve-old", "place"),
        *("pause-web", "pause-vm", "save-web", "save-vm", "manifest", "jump"),
    ]
    assert played.did[0] == "load /boot/vmlinuz"
    assert set(played.preserved) == {"memconsole:web", "memconsole:vm", "memconsole:=old", "memconsole:manifest"}
    inode = os.fstat(desk.fds("web")[0]).st_ino
    assert played.preserved["memconsole:web"] == {1: inode}
    assert desk.custody.jumped is not None
    assert {f"session:{name}" for name in played.preserved} < set(desk.custody.jumped)
    assert desk.lives("web").did == ["pause", "save"]


def test_the_manifest_says_what_to_hold_what_to_verify_and_how_guests_start(desk: Desk, played: Played) -> None:
    done(desk, played, RUN)
    found = plan(desk)
    assert [(each.session, each.name) for each in found.holds] == [
        ("memconsole:web", "region:web:0"),
        ("memconsole:vm", "region:vm:0"),
        ("memconsole:=old", "region:old:0"),
        ("memconsole:manifest", "ledger"),
        ("memconsole:manifest", "state:web"),
        ("memconsole:manifest", "state:vm"),
    ]
    assert [each.token for each in found.holds] == [1, 1, 1, 2, 3, 4]
    with desk.segment_frames("web", 0) as table:
        assert found.verifies[0] == bootplan.Verify("region:web:0", 4 * M, table.digest())
    assert [each.guest for each in found.starts] == ["web", "vm"]
    assert [each.guest for each in found.says] == ["vm"]
    described = read(desk)
    assert [(each.guest.name, each.state, each.waits) for each in described.guests] == [
        ("web", "state:web", False),
        ("vm", "state:vm", False),
    ]
    assert described.report.phases[-1].id == "manifest"
    assert described.boot_id == BOOT_ID
    assert desk.content("state:web") == b"state of web"


def test_contents_that_are_to_be_compared_are_digested_and_the_guests_wait(desk: Desk, played: Played) -> None:
    os.pwrite(desk.fds("web")[0], b"what it holds", 0)
    done(desk, played, HandoffRun(contents=True))
    described = read(desk)
    assert {each.region.name: each.contents for each in described.regions}["web"] == (digest_fd(desk.fds("web")[0]),)
    assert all(each.waits for each in described.guests)
    assert not any("cont" in line for each in plan(desk).says for line, _ in each.lines)


def test_a_guest_that_was_paused_is_not_stopped_again_and_comes_back_paused(desk: Desk, played: Played) -> None:
    desk.change(StateChange(guests=(but(desk.state.guests["web"], state=GuestState.PAUSED),)))
    desk.lives("web").says = GuestState.PAUSED
    work = done(desk, played, RUN)
    assert "pause-web" not in [step.id for step in work.steps]
    assert "--paused" in plan(desk).starts[0].words
    assert not read(desk).guests[0].waits


def test_nothing_is_done_where_the_kernel_that_is_next_runs_and_that_was_asked_for(desk: Desk, played: Played) -> None:
    again = HandoffRun(unless_running=True)
    seen = handoffs.seen(desk, played, again)
    assert seen.next_kernel == "7.3.5 #5 SMP"
    runs = sequence.made_of(desk, again, replace(seen, running="7.3.5 #5 SMP", kept=("incoming:x",)), played)
    assert (runs.steps, runs.refusals) == ([], [])
    assert "7.3.5 #5 SMP already" in runs.text
    for running in ("7.3.5 #4 SMP", ""):
        work = sequence.made_of(desk, again, replace(seen, running=running), played)
        assert work.steps[-1].id == "jump"
        assert (work.from_kernel, work.to_kernel) == (running, "7.3.5 #5 SMP")
    assert sequence.made_of(desk, RUN, replace(seen, running="7.3.5 #5 SMP"), played).steps[-1].id == "jump"


def test_sessions_that_are_kept_are_finished_where_that_was_asked_for(desk: Desk, played: Played) -> None:
    desk.keep("incoming:memconsole:old")
    refused_work = sequence.made_of(desk, RUN, handoffs.seen(desk, played, RUN), played)
    assert [each.code for each in refused_work.refusals] == ["SessionKept"]
    assert refused_work.steps == []
    work = done(desk, played, HandoffRun(finish=True))
    assert work.steps[1].id == "finish"
    assert "finish adopted" in played.did
    assert "incoming:memconsole:old" not in desk.custody.names()


def test_what_an_earlier_handoff_left_is_let_go_at_the_beginning(desk: Desk, played: Played) -> None:
    for name in ("session:memconsole:gone", "state:gone", "started:web", f"iova:{BDF}", "manifest", "resume", "landed"):
        desk.keep(name)
    work = planned(desk, played, RUN)
    work.steps[0].do()
    assert {name for name in desk.custody.names() if not name.startswith("region:")} == {"ledger"}
    assert desk.handoff is not None
    assert desk.handoff.state is HandoffState.RUNNING


def test_a_condition_that_does_not_hold_refuses_and_makes_no_step(desk: Desk, played: Played) -> None:
    seen = replace(handoffs.seen(desk, played, RUN), survival=Survival(kho=True), survives=False)
    work = sequence.made_of(desk, RUN, seen, played)
    assert {each.code for each in work.refusals} == {"LiveUpdate", "Custody"}
    assert work.steps == []
    assert work.conditions


def test_a_guest_that_ended_is_no_part_of_it_and_one_that_ends_meanwhile_ends_it(desk: Desk, played: Played) -> None:
    seen = handoffs.seen(desk, played, RUN)
    desk.remove_guest("web")
    with pytest.raises(NotFound, match="web is gone"):
        sequence.made_of(desk, RUN, seen, played)
    assert not any(step.id.endswith("-web") for step in planned(desk, played, RUN).steps if "preserve" not in step.id)
    work = planned(desk, played, RUN)
    desk_vm = desk.lives("vm")
    next(step for step in work.steps if step.id == "check").do()
    desk.remove_guest("vm")
    with pytest.raises(NotFound, match="vm is gone"):
        next(step for step in work.steps if step.id == "save-vm").do()
    undo = next(step for step in work.steps if step.id == "pause-vm").undo
    assert undo is not None
    undo()
    assert "resume" not in desk_vm.did  # it is another's by now, or nobody's


# --- devices --------------------------------------------------------------------------------------------------------


def test_devices_are_recorded_while_guests_run_and_quiet_before_the_others_stop(with_device: Desk) -> None:
    played = Played(with_device)
    work = done(with_device, played, RUN)
    ids = [step.id for step in work.steps]
    order = [f"iova-{BDF}", "pause-web", "save-web", f"quiesce-{BDF}", "pause-vm", "save-vm", "manifest"]
    assert [id for id in ids if id in order] == order
    described = read(with_device)
    (recorded,) = described.devices
    assert (recorded.bdf, recorded.source, recorded.pages, recorded.preserved) == (BDF, "ledger", 1024, False)
    assert recorded.quiesced_ns is not None
    assert f"iova:{BDF}" in [each.name for each in plan(with_device).holds]
    assert with_device.address_spaces.quiesced == {BDF}
    assert {each.guest.name: each.waits for each in described.guests} == {"web": True, "vm": False}


def test_a_device_that_the_kernel_carries_goes_along_itself(with_device: Desk) -> None:
    played = Played(with_device)
    for name in ("iommu:web", f"vfio:{BDF}"):
        with_device.keep(name)
    seen = handoffs.seen(with_device, played, RUN)
    seen = replace(seen, devices=tuple(replace(each, unpreserved="") for each in seen.devices))
    work = sequence.made_of(with_device, RUN, seen, played)
    with_device.carry(steps.run("handoff-run", work.steps))
    assert {"iommu:web", f"vfio:{BDF}"} < {each.name for each in plan(with_device).holds}
    assert read(with_device).devices[0].preserved


def test_a_vmm_that_has_its_devices_itself_is_started_by_the_next_control_process(with_device: Desk) -> None:
    with_device.address_spaces.vmm_filled = frozenset({"vm"})
    done(with_device, Played(with_device), RUN)
    assert [each.guest for each in plan(with_device).starts] == ["web"]


# --- what fails -----------------------------------------------------------------------------------------------------


def state_of(desk: Desk) -> tuple[object, ...]:
    """All that a handoff that failed must leave as it was."""
    return (
        desk.custody.names(),
        {name: live.says for name, live in ((each, desk.lives(each)) for each in ("web", "vm"))},
        set(desk.address_spaces.quiesced),
        dict(desk.address_spaces.devices),
    )


RUN_STEPS = (
    *("check", "load", "preserve-web", "preserve-vm", "preserve-old", "place", f"iova-{BDF}", "pause-web", "save-web"),
    *(f"quiesce-{BDF}", "pause-vm", "save-vm", "manifest", "jump"),
)


@pytest.mark.parametrize("failing", RUN_STEPS)
def test_a_step_that_fails_leaves_every_guest_running_and_custody_as_it_was(with_device: Desk, failing: str) -> None:
    desk, played = with_device, Played(with_device)
    before = state_of(desk)
    work = planned(desk, played, RUN)
    assert [step.id for step in work.steps] == list(RUN_STEPS)

    def fails() -> None:
        raise refused(failing)

    made = [replace(step, do=fails) if step.id == failing else step for step in work.steps]
    with pytest.raises(MemconsoleError, match="cannot be done"):
        desk.carry(steps.run("handoff-run", made))
    assert state_of(desk) == before
    assert played.did.count("unload") == (0 if failing in {"check", "load"} else 1)
    assert desk.custody.jumped is None


@pytest.mark.parametrize(
    ("what", "failing"),
    [
        ("load", "load"),
        ("create", "preserve-web"),
        ("preserve", "preserve-web"),
    ],
)
def test_live_update_that_refuses_ends_it_with_its_own_word(desk: Desk, what: str, failing: str) -> None:
    played = Played(desk, fails={what: refused(what)})
    before = state_of(desk)
    with pytest.raises(MemconsoleError, match=f"{what} cannot be done"):
        done(desk, played, RUN)
    assert state_of(desk) == before
    assert desk.handoff is not None
    assert desk.handoff.state is HandoffState.FAILED
    assert desk.handoff.why.startswith(f"{what} cannot be done")
    assert desk.handoff.phases[-1].id == failing.partition("-")[0]


def test_a_state_that_cannot_be_saved_is_not_kept_and_the_jump_that_is_refused_undoes_all(
    desk: Desk, played: Played
) -> None:
    before = state_of(desk)
    desk.lives("vm").fails["save"] = refused("save")
    with pytest.raises(MemconsoleError, match="save cannot"):
        done(desk, played, RUN)
    assert state_of(desk) == before
    del desk.lives("vm").fails["save"]
    desk.custody.stays = refused("the jump")
    with pytest.raises(MemconsoleError, match="the jump cannot"):
        done(desk, played, RUN)
    assert state_of(desk) == before


def test_what_could_not_be_undone_is_said_and_the_rest_is_undone(desk: Desk, played: Played) -> None:
    desk.custody.stays = refused("the jump")
    desk.lives("web").fails["resume"] = refused("resume")
    with pytest.raises(MemconsoleError) as ended:
        done(desk, played, RUN)
    assert "and not undone: stop the vCPUs of web (resume cannot be done" in ended.value.why
    assert desk.lives("vm").says is GuestState.RUNNING
    assert played.did[-1] == "unload"


def test_a_suspended_qemu_that_was_saved_is_ended_and_resumed_from_what_was_saved(desk: Desk, played: Played) -> None:
    """QEMU 10 aborts when a suspended guest that was saved is to go on."""
    desk.lives("vm").says = GuestState.SUSPENDED
    desk.userfaults.served.add("g2")
    was = desk.lives("vm")
    desk.custody.stays = refused("the jump")
    work = planned(desk, played, RUN)
    with pytest.raises(MemconsoleError):
        desk.carry(steps.run("handoff-run", work.steps))
    assert was.did[-2:] == ["kill", "close"]
    assert work.then == [GuestResume("vm")]
    (gone,) = work.lasting.guests
    assert (gone.name, gone.pid, gone.state) == ("vm", None, GuestState.GONE)
    assert desk.custody.payload("state:vm") == b"suspended"
    assert "g2" not in desk.userfaults.served
    assert desk.lives("web").says is GuestState.RUNNING


def test_a_manifest_that_custody_does_not_take_leaves_no_session(desk: Desk, played: Played) -> None:
    before = state_of(desk)
    desk.custody.fails["manifest"] = refused("put")
    with pytest.raises(MemconsoleError, match="put cannot"):
        done(desk, played, RUN)
    assert "create memconsole:manifest" in played.did
    assert state_of(desk) == before


# --- a rehearsal ----------------------------------------------------------------------------------------------------


def test_a_rehearsal_restarts_every_vmm_and_the_ledger_learns_who_they_are(desk: Desk, played: Played) -> None:
    desk.userfaults.served.add("g1")
    was = desk.lives("web")
    work = done(desk, played, REHEARSE)
    assert [step.id for step in work.steps] == [
        *("check", "pause-web", "pause-vm", "save-web", "save-vm", "place", "manifest", "end", "early", "adopt")
    ]
    assert was.did == ["pause", "save", "kill", "close"]
    assert {each.name: each.pid for each in work.change.guests} == {"web": 6000, "vm": 6001}
    assert desk.lives("web").pid == 6000
    assert played.did == ["revive manifest"]
    assert not desk.userfaults.served
    assert played.preserved == {}
    desk.change(work.change)
    assert work.after is not None
    work.after()
    assert desk.handoff is not None
    assert desk.handoff.state is HandoffState.DONE
    assert [each.back for each in desk.handoff.guests] == [True, True]
    assert [(each.name, each.same) for each in desk.handoff.regions] == [("web", True), ("vm", True), ("old", True)]
    assert work.findings == []
    left = {name for name in desk.custody.names() if not name.startswith("region:")}
    assert left == {"ledger", "manifest", "report"}


def test_a_processes_guest_and_a_device_of_it_go_on_through_a_rehearsal(with_device: Desk) -> None:
    more = (but(with_device.state.grants["g1"], guest="db"),)
    with_device.change(StateChange(guests=(guest("db"),), grants=more))
    with_device.add_guest(Vmm("db", GuestKind.PROCESS))
    with_device.address_spaces.devices[BDF] = "db"
    work = done(with_device, Played(with_device), REHEARSE)
    assert not any(BDF in step.id or step.id.endswith("-db") for step in work.steps)
    assert with_device.lives("db").did == []


@pytest.mark.parametrize("failing", ["check", "pause-vm", "save-vm", "place", "manifest", "end"])
def test_a_rehearsal_that_fails_before_it_ends_a_vmm_leaves_all_as_it_was(
    desk: Desk, played: Played, failing: str
) -> None:
    before = state_of(desk)
    work = planned(desk, played, REHEARSE)

    def fails() -> None:
        raise refused(failing)

    with pytest.raises(MemconsoleError, match="cannot be done"):
        desk.carry(
            steps.run(
                "handoff-rehearse", [replace(step, do=fails) if step.id == failing else step for step in work.steps]
            )
        )
    assert state_of(desk) == before
    assert not desk.lives("web").did.count("kill")


def test_a_rehearsal_that_cannot_take_hold_starts_them_once_more(desk: Desk, played: Played) -> None:
    work = planned(desk, played, REHEARSE)

    def fails() -> None:
        raise refused("adopt")

    with pytest.raises(MemconsoleError, match="adopt cannot"):
        desk.carry(
            steps.run(
                "handoff-rehearse", [replace(step, do=fails) if step.id == "adopt" else step for step in work.steps]
            )
        )
    assert played.did == ["revive manifest", "revive manifest"]
    assert {each.name: each.pid for each in work.lasting.guests} == {"web": 6000, "vm": 6001}
    assert desk.lives("web").says is GuestState.RUNNING


def test_vmms_that_cannot_be_started_again_wait_in_custody_for_another_try(desk: Desk, played: Played) -> None:
    played.fails["revive"] = refused("revive")
    work = planned(desk, played, REHEARSE)
    with pytest.raises(MemconsoleError) as ended:
        desk.carry(steps.run("handoff-rehearse", work.steps))
    assert "and not undone: end the VMMs of web, vm" in ended.value.why
    assert {"state:web", "state:vm", "manifest"} < set(desk.custody.names())
    assert {(each.name, each.pid, each.state) for each in work.lasting.guests} == {
        ("web", None, GuestState.GONE),
        ("vm", None, GuestState.GONE),
    }
    assert work.then == [GuestResume("vm"), GuestResume("web")]


def test_the_log_of_a_rehearsal_names_each_step_with_its_time_and_each_suppressed_error_once(
    desk: Desk, played: Played, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "memconsole.steps")
    work = done(desk, played, REHEARSE)
    said = [record.getMessage() for record in caplog.records]
    for step in work.steps:
        begins = f"step action=handoff-rehearse step={step.id} state=begins does="
        ends = f"step action=handoff-rehearse step={step.id} state=done seconds="
        assert len([line for line in said if line.startswith(begins)]) == 1
        (end,) = [line for line in said if line.startswith(ends)]
        assert float(end.removeprefix(ends)) >= 0
    assert len(said) == 2 * len(work.steps)
