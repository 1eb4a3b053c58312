"""``memconsole serve`` killed between every two steps of what it does, under one canary that lives through all of it.

The points are found in the plans. An action that was cut is wholly there or wholly not once the next service answers;
the canary keeps its process, goes on counting and never finds a wrong byte.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.controls import raised
from support.faultpoints import fault_points
from support.services import Service, services
from support.waiting import LONG_S, until

from memconsole import actions
from memconsole.actions import Action
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.ledger.writer import LEDGER
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.wire.client import Client
from memconsole.errors import Gone, NoControl
from memconsole.model import GuestKind, Severity, Snapshot

M = 1 << 20
STALLED_NS = 5 * 10**9
"""A pause no scheduler makes."""

PLACES: dict[int, int] = {}


def place(shown: Snapshot) -> int:
    """Where the canary gets the region: other memory elsewhere, for it holds a place to the contents it had there."""
    inode = next(region.segments[0].inode for region in shown.regions if region.name == "new")
    return (1 << 30) + PLACES.setdefault(inode, len(PLACES)) * 2 * M


Doing = Callable[[Snapshot], Action]
CYCLES: dict[str, list[Doing]] = {
    "memory": [
        lambda _: actions.Reserve("new", 2 * M, prefault=True),
        lambda shown: actions.Map("new", "watch", gpa=place(shown)),
        lambda shown: actions.Revoke(next(grant.id for grant in shown.grants if grant.region == "new")),
        lambda _: actions.Release("new"),
    ],
    "guests": [
        lambda _: actions.GuestStart("second", memory=2 * M),
        lambda _: actions.GuestPause("second"),
        lambda _: actions.GuestResume("second"),
        lambda _: actions.GuestStop("second"),
        lambda _: actions.Release("second"),
    ],
}
"""What ends where it began; each action is cut at each of its points."""


@pytest.fixture
def service() -> Iterator[Service]:
    with services() as made:
        yield made


def essence(service: Service, shown: Snapshot) -> tuple[object, ...]:
    """What there is, in the Snapshot, with the keeper and among processes; ids of grants differ from time to time."""
    ours = [guest for guest in shown.guests if guest.kind is not GuestKind.FOREIGN]
    service.guests |= {guest.pid for guest in ours if guest.pid is not None}
    with contextlib.closing(KeeperCustody(service.runtime / "keeper")) as keeper:
        held = [name for name in keeper.names() if name != LEDGER]
    return (
        tuple((region.name, region.state, region.size) for region in shown.regions),
        tuple((guest.name, guest.state) for guest in ours),
        tuple((grant.region, grant.guest, grant.state, len(grant.seen)) for grant in shown.grants),
        tuple(held),
        len(canaries(service)),
    )


def canaries(service: Service) -> list[int]:
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes() if path.name.isdigit() else b""
            if b"canary" in words.split(b"\0")[0] and str(service.runtime).encode() in words:
                found.append(int(path.name))
    return found


class Canary:
    """The guest that watches: it must be there, be the same, have counted on, and have found nothing wrong."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.beats = 0
        self.looks = 0

    def look(self, client: Client, when: str = "") -> None:
        def counted() -> bool:
            guest = next(guest for guest in client.snapshot().guests if guest.name == "watch")
            if guest.progress is None or guest.progress.beats <= self.beats:
                return False
            assert self.pid in {None, guest.pid}
            assert guest.progress.wrong == 0, when
            assert guest.progress.gap_ns < STALLED_NS, when
            self.pid, self.beats = guest.pid, guest.progress.beats
            return True

        until(counted, "the canary counts on")
        self.looks += 1


def cut(service: Service, client: Client, action: Action) -> None:
    """Apply an action that kills the service on its way."""
    assert service.process is not None
    with pytest.raises(NoControl) as caught:
        client.apply(action)
    assert caught.value.code == "ControlDied"
    service.process.communicate(timeout=LONG_S)
    assert service.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("cycle", CYCLES)
def test_killed_between_any_two_steps(service: Service, cycle: str) -> None:
    doings = CYCLES[cycle]
    canary = Canary()
    states: list[tuple[object, ...]] = []
    points: list[tuple[int, str]] = []
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.GuestStart("watch", memory=4 * M))
        canary.look(client)
        for number, doing in enumerate(doings):
            states.append(essence(service, client.snapshot()))
            action = doing(client.snapshot())
            points += [(number, point) for point in fault_points(client.plan(action))]
            client.apply(action)
        assert essence(service, client.snapshot()) == states[0]
        canary.look(client)
    service.end(signal.SIGKILL)
    assert all(before != after for before, after in zip(states, [*states[1:], states[0]], strict=True))
    assert len(points) >= 2 * len(doings)

    at = 0
    for number, point in points:
        service.start(env={FAULT_VARIABLE: point})
        with contextlib.closing(service.client()) as client:
            canary.look(client)
            while at != number:
                client.apply(doings[at](client.snapshot()))
                at = (at + 1) % len(doings)
                assert essence(service, client.snapshot()) == states[at]
            cut(service, client, doings[number](client.snapshot()))
        service.start()
        with contextlib.closing(service.client()) as client:
            canary.look(client, point)
            after = (number + 1) % len(doings)
            until(lambda: essence(service, client.snapshot()) in {states[number], states[after]}, point)  # noqa: B023
            at = number if essence(service, client.snapshot()) == states[number] else after
            assert [found for found in client.snapshot().findings if found.subject in {"new", "second"}] == []
        service.end(signal.SIGKILL)
    assert canary.looks == 2 * len(points) + 2
    os.kill(canary.pid or 0, 0)  # the one that was there before the first kill


def test_a_keeper_that_is_killed_is_replaced_by_one_that_holds_the_same(service: Service) -> None:
    canary = Canary()
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.GuestStart("watch", memory=4 * M))
        canary.look(client)
        with contextlib.closing(KeeperCustody(service.runtime / "keeper")) as keeper:
            pid = keeper.pid
            held = keeper.names()
        os.kill(pid, signal.SIGKILL)
        canary.look(client)
        client.apply(actions.Reserve("new", M))
        with contextlib.closing(KeeperCustody(service.runtime / "keeper")) as keeper:
            assert keeper.pid != pid
            assert keeper.names() == sorted([*held, "region:new:0"])
        assert [region.name for region in client.snapshot().regions] == ["watch", "new"]
        (found,) = [found for found in raised(client.snapshot()) if found.severity is not Severity.INFO]
        assert (found.id, f"pid {pid}" in found.observed, "lost" in found.observed) == ("custody-replaced", True, False)
    service.end(signal.SIGKILL)  # the new one is as good as the old one
    service.start()
    with contextlib.closing(service.client()) as client:
        assert [region.name for region in client.snapshot().regions] == ["watch", "new"]
        assert [found for found in raised(client.snapshot()) if found.severity is not Severity.INFO] == []
        canary.look(client)
        service.guests.add(canary.pid or 0)


def test_where_no_other_keeper_can_be_the_loss_is_told_until_one_can(service: Service) -> None:
    canary = Canary()
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.GuestStart("watch", memory=4 * M))
        with contextlib.closing(KeeperCustody(service.runtime / "keeper")) as keeper:
            held = keeper.names()
            os.kill(keeper.pid, signal.SIGKILL)
        place = service.runtime / "keeper"
        place.unlink()
        place.mkdir()
        canary.look(client)
        (found,) = [found for found in client.snapshot().findings if found.severity is Severity.ERROR]
        assert (found.id, "only this process holds the regions" in found.observed) == ("custody-gone", True)
        with pytest.raises(Gone):
            client.apply(actions.Reserve("new", M))
        place.rmdir()
        client.apply(actions.Reserve("new", M))
        assert "custody-gone" not in {found.id for found in client.snapshot().findings}
        with contextlib.closing(KeeperCustody(place)) as keeper:
            assert keeper.names() == sorted([*held, "region:new:0"])
        canary.look(client)
        service.guests.add(canary.pid or 0)
