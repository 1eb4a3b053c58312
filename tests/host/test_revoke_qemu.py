"""A QEMU is asked for its RAM: it is saved, ends by itself, and goes on when it has its region again."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from support import controls
from support.firmware import firmware
from support.services import Service, services
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.backend.guests.commandline import BINARY
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.errors import GuestError, MemconsoleError, Refused
from memconsole.model import Guest, GuestState, RevokeOutcome, RevokeReport, Rung, Snapshot

M = controls.M
RAM = 32 * M

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="reads PFNs and rules guests: root"),
    pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed"),
]


class Place:
    """A service with a QEMU on it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        service.start()
        self.client = service.client()
        self.client.apply(do.GuestStart("vm", vmm="qemu", memory=RAM))
        self.pid = self.guest().pid or 0
        service.guests.add(self.pid)

    def restart(self, fault: str = "") -> None:
        """kill -9, and another one, which dies at a fault point."""
        self.client.close()
        if self.service.process is not None:
            self.service.process.kill()
            self.service.process.communicate()
        self.service.start(env={FAULT_VARIABLE: fault})
        self.client = self.service.client()

    def shown(self) -> Snapshot:
        return self.client.snapshot()

    def guest(self) -> Guest:
        return controls.guest(self.shown(), "vm")

    def revoke(self, grant: str = "g1", within: float = 20.0, at_most: Rung = Rung.ASK) -> RevokeReport:
        report = self.client.apply(do.Revoke(grant, within=within, at_most=at_most)).revoke
        assert report is not None
        return report

    def come_back(self) -> None:
        """The region is granted again, and the guest goes on."""
        with pytest.raises(Refused, match="has no RAM"):
            self.client.apply(do.GuestResume("vm"))
        self.client.apply(do.Map("vm", "vm"))
        self.client.apply(do.GuestResume("vm"))
        self.pid = self.guest().pid or 0
        self.service.guests.add(self.pid)
        assert self.guest().state is GuestState.RUNNING
        assert [seen.pid for grant in self.shown().grants for seen in grant.seen] == [self.pid]

    def findings(self) -> set[str]:
        return {finding.id for finding in self.shown().findings if finding.subject == "vm"}


@pytest.fixture
def place() -> Iterator[Place]:
    with services() as service:
        place = Place(service)
        yield place
        place.client.close()


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_is_saved_ends_and_goes_on_with_its_region(place: Place) -> None:
    with pytest.raises(Refused, match="takes no more memory"):
        place.client.apply(do.Map("vm", "vm"))
    report = place.revoke()
    assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.CUT)
    until(lambda: ended(place.pid), "QEMU ends")
    guest = place.guest()
    assert (guest.state, guest.pid) == (GuestState.GONE, None)
    assert place.findings() == {"guest-aside"}
    assert place.shown().grants == ()
    place.client.apply(do.Reserve("other", RAM))
    with pytest.raises(Refused, match="waits for other memory"):
        place.client.apply(do.Map("other", "vm"))
    place.restart()
    place.come_back()
    assert "guest-aside" not in place.findings()
    place.client.apply(do.GuestPause("vm"))
    assert place.revoke("g2").rung is Rung.ASK
    place.client.apply(do.Map("vm", "vm"))
    place.client.apply(do.GuestResume("vm"))
    assert place.guest().state is GuestState.PAUSED, "as it was"
    place.service.guests.add(place.guest().pid or 0)
    assert place.revoke("g3").rung is Rung.ASK
    place.client.apply(do.GuestStop("vm"))
    assert "vm" not in {guest.name for guest in place.shown().guests}
    place.client.apply(do.Release("vm"))


def test_one_that_ignores_the_ask_is_taken_by_a_harder_rung(place: Place) -> None:
    os.kill(place.pid, signal.SIGSTOP)
    with pytest.raises(GuestError) as error:
        place.revoke(within=1.0)
    assert error.value.code == "StillMapped"
    os.kill(place.pid, signal.SIGCONT)
    until(lambda: place.guest().state is GuestState.RUNNING, "it goes on, and knows of nothing")
    os.kill(place.pid, signal.SIGSTOP)
    report = place.revoke(within=1.0, at_most=Rung.KILL)
    assert report.rung is Rung.COPY
    assert "a signal has stopped it" in report.note
    os.kill(place.pid, signal.SIGCONT)
    assert place.shown().grants == ()
    place.client.apply(do.GuestStop("vm"))
    place.client.apply(do.Release("vm"))


@pytest.mark.parametrize("point", ["revoke.ask.before", "revoke.aside.saved", "revoke.aside.held", "revoke.ask.after"])
def test_a_service_that_dies_in_the_ask_has_it_done_by_the_next(place: Place, point: str) -> None:
    place.restart(point)
    with pytest.raises(MemconsoleError):
        place.revoke()
    assert place.service.process is not None
    assert place.service.process.wait(LONG_S) == -signal.SIGKILL
    place.restart()
    assert place.shown().grants == ()
    until(lambda: ended(place.pid), "QEMU ends")
    assert place.findings() == {"guest-aside"}
    place.come_back()


def test_one_that_is_suspended_is_not_asked_and_stays_so(place: Place) -> None:
    def state() -> GuestState:
        return controls.guest(place.shown(), "still").state

    start = do.GuestStart("still", vmm="qemu", memory=RAM, args=firmware(place.service.directory, 1000))
    place.client.apply(start)
    place.service.guests.add(controls.guest(place.shown(), "still").pid or 0)
    until(lambda: state() is GuestState.SUSPENDED, "it is suspended")
    with pytest.raises(GuestError, match="suspended to RAM"):
        place.revoke("g2")
    assert state() is GuestState.SUSPENDED
