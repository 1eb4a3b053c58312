"""A QEMU gives its RAM back by ending: what of it is kept, and how it is started again from that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.handoffs import Desk, Played, Vmm, refused, two_guests

from memconsole import actions as do
from memconsole.backend import own_findings, steps
from memconsole.backend.handoff import bootplan
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.peers.handle import GIVEN_FD
from memconsole.backend.revoke import suspend_vm
from memconsole.backend.revoke.ladder import Ladder
from memconsole.backend.verbs import prepare
from memconsole.errors import GuestError
from memconsole.model import Access, GrantState, GuestKind, GuestState, RevokeOutcome, Rung

SAVED = ["aside-plan:vm", "aside:vm"]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


def vm(desk: Desk) -> Vmm:
    found = desk.live_guest("vm")
    assert isinstance(found, Vmm)
    return found


def saved(desk: Desk) -> list[str]:
    return [name for name in desk.custody.names() if name.startswith("aside")]


def planned(fd: int) -> bootplan.BootPlan:
    """The boot plan in a file, which is closed."""
    with contextlib.closing(os.fdopen(fd, "rb")):
        return bootplan.decode(os.pread(fd, 1 << 20, 0))


def given_back(desk: Desk) -> None:
    """Revoke the QEMU's RAM, and have the ledger say so."""
    ladder = Ladder(desk, desk.state.grants["g2"], 5, Rung.ASK)
    desk.carry(ladder.climb())
    desk.change(ladder.change())


def test_a_qemu_is_saved_and_ends_and_its_guest_waits(desk: Desk) -> None:
    live = vm(desk)
    ladder = Ladder(desk, desk.state.grants["g2"], 5, Rung.ASK)
    report = desk.carry(ladder.climb())
    assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.CUT)
    assert live.did == ["answer", "save", "quit"]
    assert saved(desk) == SAVED
    assert desk.content("aside:vm") == b"state of vm"
    desk.change(ladder.change())
    assert (desk.state.guests["vm"].state, desk.state.guests["vm"].pid) == (GuestState.GONE, None)
    assert "g2" not in desk.state.grants
    (finding,) = own_findings.waiting_guests(desk)
    assert (finding.id, finding.subject) == ("guest-aside", "vm")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vfio": True}, "a device is passed through to it"),
        ({"says": GuestState.SUSPENDED}, "it is suspended to RAM"),
        ({"shares_ram": False}, "x-ignore-shared"),
    ],
)
def test_a_qemu_that_cannot_be_saved_is_not_asked_to_end(desk: Desk, changes: dict[str, object], why: str) -> None:
    live = vm(desk)
    for name, value in changes.items():
        setattr(live, name, value)
    with pytest.raises(GuestError, match=why):
        suspend_vm.suspend_guest(desk, live, desk.state.grants["g2"], 5)
    assert live.did == ["answer"]
    assert saved(desk) == []


def test_a_custody_from_which_nothing_is_started_again_keeps_no_state(desk: Desk) -> None:
    desk.custody.resumes = False
    with pytest.raises(GuestError, match="only from the keeper"):
        suspend_vm.suspend_guest(desk, vm(desk), desk.state.grants["g2"], 5)


@pytest.mark.parametrize("fails", ["save", "quit"])
def test_a_qemu_that_fails_on_the_way_goes_on_as_it_was(desk: Desk, fails: str) -> None:
    live = vm(desk)
    live.fails[fails] = GuestError(f"{fails} failed")
    with pytest.raises(GuestError, match=f"{fails} failed"):
        suspend_vm.suspend_guest(desk, live, desk.state.grants["g2"], 5)
    assert live.did[-1] == "resume"
    assert saved(desk) == []


def test_a_qemu_that_was_paused_stays_so(desk: Desk) -> None:
    desk.change(StateChange(guests=(replace(desk.state.guests["vm"], state=GuestState.PAUSED),)))
    live = vm(desk)
    live.fails["quit"] = GuestError("it does not quit")
    with pytest.raises(GuestError):
        suspend_vm.suspend_guest(desk, live, desk.state.grants["g2"], 5)
    assert "resume" not in live.did


def test_one_that_is_saved_already_is_not_saved_again(desk: Desk) -> None:
    live = vm(desk)
    live.saved = True
    desk.keep("aside:vm", b"state of vm", b'{"region":"vm","paused":false}')
    suspend_vm.suspend_guest(desk, live, desk.state.grants["g2"], 5)
    assert live.did == ["answer", "quit"]


# --- again --------------------------------------------------------------------------------------------------------


def test_a_guest_that_waits_is_given_its_ram_and_no_other(desk: Desk) -> None:
    given_back(desk)
    for wrong in (do.Map("old", "vm"), do.Map("vm", "vm", length=4096), do.Map("vm", "vm", access=Access.RO)):
        (refusal,) = prepare(desk, wrong).refusals
        assert (refusal.code, refusal.remedy) == ("OtherRam", "memconsole map vm vm")
    made = prepare(desk, do.Map("vm", "vm"))
    desk.carry(steps.run("map", made.steps))
    (grant,) = made.change.grants
    assert (grant.region, grant.gpa, grant.state) == ("vm", 0, GrantState.OFFERED)


def test_a_guest_without_ram_is_not_started(desk: Desk) -> None:
    given_back(desk)
    (refusal,) = prepare(desk, do.GuestResume("vm")).refusals
    assert (refusal.code, refusal.remedy) == ("NoRam", "memconsole map vm vm, then resume it")


def test_a_guest_goes_on_from_what_was_saved_of_it(desk: Desk) -> None:
    given_back(desk)
    made = prepare(desk, do.Map("vm", "vm"))
    desk.carry(steps.run("map", made.steps))
    desk.change(made.change)
    played = Played(desk)
    again = suspend_vm.restart_saved_guest(desk, desk.state.guests["vm"], played)
    desk.carry(steps.run("guest-resume", again.steps))
    assert played.did == ["revive again:vm"]
    (back,) = again.change.guests
    (mapped,) = again.change.grants
    assert (back.pid, back.state, mapped.state) == (6000, GuestState.RUNNING, GrantState.MAPPED)
    assert saved(desk) == []


def test_a_guest_is_started_where_its_region_is_by_then(desk: Desk) -> None:
    given_back(desk)
    plan = planned(desk.custody.get("aside-plan:vm")[0])
    backend = f"memory-backend-file,id=ram,size=8388608,mem-path=/proc/self/fd/{GIVEN_FD},share=on,align=2M"
    words = ("qemu-system-x86_64", "-object", f"{backend},offset=2097152")
    start = replace(plan.starts[0], words=words)
    desk.keep("aside-plan:vm", bootplan.encode(plan._replace(starts=(start,))))
    region = desk.state.regions["vm"]
    for at, said in ((4 << 20, f"{backend},offset=4194304"), (0, backend)):
        fd = suspend_vm._plan_of(desk, "vm", replace(region, segments=(replace(region.segments[0], start=at),)))
        (again,) = planned(fd).starts
        assert (again.words[-1], again.fds) == (said, start.fds)


def test_a_guest_that_does_not_come_back_waits_still(desk: Desk) -> None:
    given_back(desk)
    made = prepare(desk, do.Map("vm", "vm"))
    desk.carry(steps.run("map", made.steps))
    desk.change(made.change)
    again = suspend_vm.restart_saved_guest(
        desk, desk.state.guests["vm"], Played(desk, fails={"revive": refused("revive")})
    )
    with pytest.raises(Exception, match="revive cannot be done"):
        desk.carry(steps.run("guest-resume", again.steps))
    assert saved(desk) == SAVED
    assert suspend_vm.is_saved(desk, "vm")


def test_one_that_was_paused_comes_back_paused(desk: Desk) -> None:
    desk.change(StateChange(guests=(replace(desk.state.guests["vm"], state=GuestState.PAUSED),)))
    given_back(desk)
    desk.change(
        StateChange(grants=(replace(desk.state.checkpoint().everything.grants[0], id="g9", region="vm", guest="vm"),))
    )
    again = suspend_vm.restart_saved_guest(desk, desk.state.guests["vm"], Played(desk))
    desk.carry(steps.run("guest-resume", again.steps))
    assert [each.state for each in again.change.guests] == [GuestState.PAUSED]


# --- tidying ------------------------------------------------------------------------------------------------------


def test_what_was_saved_of_guests_that_are_no_more_or_run_is_forgotten(desk: Desk) -> None:
    for name in ("aside:vm", "aside-plan:vm", "aside:ghost", "aside-plan:ghost"):
        desk.keep(name)
    suspend_vm.drop_stale_states(desk)
    assert saved(desk) == []


def test_what_was_saved_of_a_guest_that_waits_is_kept(desk: Desk) -> None:
    given_back(desk)
    suspend_vm.drop_stale_states(desk)
    assert saved(desk) == SAVED


def test_a_state_that_cannot_be_read_is_a_finding(desk: Desk) -> None:
    given_back(desk)
    desk.keep("aside:vm", b"", b"not JSON")
    (finding,) = own_findings.waiting_guests(desk)
    assert (finding.id, finding.subject) == ("custody-unknown", "aside:vm")


def test_a_guest_that_only_ended_does_not_wait(desk: Desk) -> None:
    with contextlib.suppress(GuestError):
        desk.remove_guest("vm")
    desk.change(StateChange(guests=(replace(desk.state.guests["vm"], state=GuestState.GONE, pid=None),)))
    assert own_findings.waiting_guests(desk) == ()
    assert not suspend_vm.is_saved(desk, "vm")
    assert desk.state.guests["vm"].kind is GuestKind.QEMU
