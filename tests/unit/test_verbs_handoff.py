"""``guest resume`` behind a handoff, what is tidied then, and the plans of ``handoff run`` and ``rehearse``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.handoffs import Desk, Played, refused, two_guests

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.verbs import handoff, prepare
from memconsole.errors import KernelRefused
from memconsole.model import GuestState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with two_guests(tmp_path) as made:
        yield made


def left(desk: Desk, guest: str = "vm") -> None:
    """Have a guest not come back from a handoff: its state is in custody."""
    desk.remove_guest(guest)
    desk.keep(f"state:{guest}", b"saved")


def test_a_guest_that_did_not_come_back_is_started_from_what_was_saved(desk: Desk) -> None:
    left(desk)
    played = Played(desk)
    assert [step.id for step in prepare(desk, do.GuestResume("vm")).steps] == ["again", "go-on"]
    made = handoff.restart_saved_guest(desk, desk.state.guests["vm"], played)
    desk.carry(steps.run("guest-resume", made.steps))
    (back,) = made.change.guests
    assert (back.pid, back.state) == (6000, GuestState.RUNNING)
    assert [each.state for each in made.lasting.guests] == [GuestState.PAUSED]
    assert "state:vm" in desk.custody.names(), "until the ledger knows"
    assert made.after is not None
    made.after()
    assert "state:vm" not in desk.custody.names()


def test_one_that_does_not_come_back_again_keeps_what_was_saved(desk: Desk) -> None:
    left(desk)
    made = handoff.restart_saved_guest(desk, desk.state.guests["vm"], Played(desk, fails={"revive": refused("revive")}))
    with pytest.raises(KernelRefused, match="revive cannot be done"):
        desk.carry(steps.run("guest-resume", made.steps))
    assert handoff.is_saved(desk, "vm")
    assert made.after is None


def test_a_guest_that_is_stopped_gives_up_what_was_saved_of_it(desk: Desk) -> None:
    left(desk)
    made = prepare(desk, do.GuestStop("vm"))
    desk.carry(steps.run("guest-stop", made.steps))
    assert "state:vm" not in desk.custody.names()


def test_a_session_is_closed_once_nothing_that_came_in_it_is_left(desk: Desk) -> None:
    desk.keep("incoming:web", payload=b"region:web:0\n")
    desk.keep("incoming:old", payload=b"region:gone:0\nstate:gone\n")
    desk.keep("incoming:torn", payload=b"region:gone:0")
    handoff.finish_sessions(desk)
    found = [name for name in desk.custody.names() if name.startswith("incoming")]
    assert found == ["incoming:torn", "incoming:web"], "one whose list is not whole is kept"


def test_a_guest_without_a_state_in_custody_is_not_waited_for(desk: Desk) -> None:
    assert not handoff.is_saved(desk, "vm")
    assert not handoff.awaits_devices(desk, "vm")


@pytest.mark.parametrize("action", [do.HandoffRun(), do.HandoffRehearse()])
def test_the_plan_of_a_handoff_shows_its_conditions(desk: Desk, action: do.Action) -> None:
    made = prepare(desk, action)
    assert made.conditions
    failed = {each.id for each in made.conditions if not each.ok}
    assert {each.code.lower() for each in made.refusals} <= {each.replace("-", "") for each in failed}
    assert bool(made.refusals) != bool(made.steps)
