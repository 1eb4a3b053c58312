"""``window map`` and ``window revoke``: MMIO that is granted like memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.desks import Desk, Facts, Live, desk_of, desks, guest

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.ledger.state import StateChange, WindowGrant
from memconsole.backend.verbs import prepare
from memconsole.errors import Gone, GuestError
from memconsole.model import GuestKind, Window

NIC = "0000:00:04.0"
BAR = Window(f"{NIC}:0", NIC, 0, 0xFEBC0000, 0x20000)
WINDOWS = (
    BAR,
    replace(BAR, id=f"{NIC}:1", bar=1, io=True),
    replace(BAR, id=f"{NIC}:2", bar=2, size=128),
    replace(BAR, id=f"{NIC}:3", bar=3, claimed="e1000"),
    replace(BAR, id=f"{NIC}:4", bar=4, driver="ahci", claimed="vfio-pci"),
    replace(BAR, id=f"{NIC}:5", bar=5),
)
HAD = WindowGrant("g5", f"{NIC}:5", "db", 1)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desks(
        tmp_path,
        guests=(guest(), guest("vm", GuestKind.QEMU, pid=4001)),
        window_grants=(HAD,),
        live=(Live("db"), Live("vm", GuestKind.QEMU, 4001)),
        windows=WINDOWS,
    ) as made:
        yield made


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (do.WindowMap("0000:00:1f.7:0", "db"), "NoSuchWindow"),
        (do.WindowMap(BAR.id, "none"), "NoSuchGuest"),
        (do.WindowMap(f"{NIC}:1", "db"), "NotMmio"),
        (do.WindowMap(f"{NIC}:2", "db"), "BadRange"),
        (do.WindowMap(f"{NIC}:3", "db"), "Claimed"),
        (do.WindowMap(f"{NIC}:4", "db"), "Claimed"),
        (do.WindowMap(f"{NIC}:5", "db"), "Granted"),
        (do.WindowMap(BAR.id, "vm"), "NoWindows"),
        (do.WindowRevoke("0000:00:1f.7:0"), "NoSuchWindow"),
        (do.WindowRevoke(BAR.id), "NoSuchGrant"),
    ],
)
def test_a_window_that_cannot_be_given_or_taken_is_refused_by_name(desk: Desk, action: do.Action, code: str) -> None:
    made = prepare(desk, action)
    assert [each.code for each in made.refusals] == [code]
    assert not made.steps


def test_a_device_of_another_guest_gives_no_window(desk: Desk) -> None:
    desk.address_spaces.devices[NIC] = "vm"
    (refusal,) = prepare(desk, do.WindowMap(BAR.id, "db")).refusals
    assert refusal.code == "DeviceInUse"
    assert "guest vm has device" in refusal.why


def test_a_window_is_offered_and_asked_back_when_a_later_step_fails(desk: Desk) -> None:
    made = prepare(desk, do.WindowMap(BAR.id, "db"))
    desk.carry(steps.run("window-map", made.steps))
    live = desk.live_guest("db")
    assert live is not None
    assert live.did == ["offer g6"]
    assert [(each.id, each.window) for each in made.change.windows] == [("g6", BAR.id)]
    (step,) = made.steps
    assert step.undo is not None
    step.undo()
    assert live.did == ["offer g6", "unmap g6"]
    desk.remove_guest("db")
    step.undo()
    with pytest.raises(Gone, match="guest db is gone"):
        desk.carry(steps.run("window-map", made.steps))


def test_a_window_is_taken_back_once_the_kernel_shows_it_with_nobody(desk: Desk) -> None:
    made = prepare(desk, do.WindowRevoke(f"{NIC}:5"))
    desk.carry(steps.run("window-revoke", made.steps))
    assert made.change == StateChange(without_windows=("g5",))
    assert desk.withdrawn == ["g5"]


@pytest.mark.parametrize(
    ("live", "why"),
    [
        (Live("db"), "it did not unmap it"),
        (Live("db", unmaps=False), "it has no agent that would unmap it"),
        (Live("db", trouble=GuestError("db does not answer")), "db does not answer"),
        (Live("db", trouble=Gone("db is gone")), "it did not unmap it"),
        (None, "it did not unmap it"),
    ],
)
def test_a_window_that_a_guest_keeps_is_not_taken_back(tmp_path: Path, live: Live | None, why: str) -> None:
    lives = () if live is None else (live,)
    facts = Facts(guests=(guest(),), window_grants=(HAD,), windows=WINDOWS, live=lives, window_kept=True)
    with desk_of(tmp_path, facts) as desk:
        made = prepare(desk, do.WindowRevoke(f"{NIC}:5"))
        with pytest.raises(GuestError) as kept:
            desk.carry(steps.run("window-revoke", made.steps))
        assert kept.value.code == "StillMapped"
        assert why in kept.value.why
        assert "process 4000" in kept.value.remedy
        assert desk.withdrawn == []
