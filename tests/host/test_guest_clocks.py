"""Wall clocks of guests after a rehearsal: late, said so, and put right by a guest's own agent."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import agent_guest
from support.controls import goes_on, runtime_dir
from support.waiting import until

from memconsole import actions as do
from memconsole import timeline
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.guests import commandline
from memconsole.backend.guests.guestagent import Channel
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.errors import GuestError, Refused
from memconsole.model import GuestClock, GuestResult

M = 1 << 20
SECOND = 1_000_000_000
VMCLOCK, MARKER = 0xFEFFB000, 0x10
"""Where QEMU has the page of its vmclock, and where in it the number stands that changes with each break."""

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="rules guests: root"),
    pytest.mark.skipif(shutil.which(commandline.BINARY) is None, reason=f"{commandline.BINARY} is not installed"),
]


@pytest.fixture
def control() -> Iterator[Control]:
    with runtime_dir() as directory:
        KeeperCustody.start(directory).close()
        try:
            with contextlib.closing(Control(directory, KeeperCustody(directory / "keeper"))) as found:
                yield found
                for guest in found.snapshot().guests:
                    if guest.kind != "foreign":
                        found.apply(do.GuestStop(guest.name))
        finally:
            with contextlib.closing(KeeperCustody(directory / "keeper")) as keeper:
                keeper.end(holding=True)


def carried(control: Control, name: str) -> GuestResult:
    made = control.snapshot().handoff
    assert made is not None
    return next(guest for guest in made.guests if guest.name == name)


def looked_after(control: Control, name: str) -> tuple[GuestResult, GuestClock]:
    """A guest that was carried over, and its clock, once it was looked after."""
    until(lambda: carried(control, name).clock is not None, "the report tells of the clock", 60)
    found = carried(control, name)
    assert found.clock is not None
    return found, found.clock


def answers(channel: Path) -> bool:
    try:
        Channel("vm", channel, 5).close()
    except GuestError:
        return False
    return True


def marker(control: Control, file: Path) -> int:
    """What the vmclock says: a number that is another one after each break."""
    live = control._desk.live_guest("vm")
    assert isinstance(live, QemuGuest)
    live._execute("pmemsave", arguments={"val": VMCLOCK, "size": 4096, "filename": str(file)})
    return int(struct.unpack_from("<Q", file.read_bytes(), MARKER)[0])


def test_a_guests_agent_puts_its_clock_right(control: Control, tmp_path: Path) -> None:
    words = (*agent_guest.words(tmp_path), "-device", "vmclock")
    control.apply(do.GuestStart("vm", vmm="qemu", memory=192 * M, agent=True, args=words))
    channel = control.runtime_dir / "vmm" / "vm" / "agent"
    until(lambda: answers(channel), "the guest's agent", 240)
    with Channel("vm", channel, 60) as agent:  # a blackout that would take a hundred seconds
        agent.set_time(time.time_ns() - 100 * SECOND)
    before = marker(control, tmp_path / "page")
    control.apply(do.HandoffRehearse())
    vm, clock = looked_after(control, "vm")
    assert clock.note == "its agent set the clock"
    assert clock.was_ns is not None
    assert clock.was_ns > 99 * SECOND
    assert clock.late_ns is not None
    assert abs(clock.late_ns) < 30 * SECOND
    assert clock.sources == ("vmclock",)
    assert marker(control, tmp_path / "page") != before
    with Channel("vm", channel, 60) as agent:
        assert abs(agent.time() - time.time_ns()) < 30 * SECOND
    assert "late, and is" in timeline.clock(vm)
    assert "vmclock reports the break" in timeline.clock(vm)


def test_a_guest_without_an_agent_stays_late_and_the_report_says_so(control: Control) -> None:
    control.apply(do.GuestStart("vm", vmm="qemu", memory=32 * M))
    control.apply(do.GuestStart("bird", memory=8 * M))
    goes_on(control, "bird")
    control.apply(do.HandoffRehearse())
    vm, clock = looked_after(control, "vm")
    assert clock.late_ns is None
    assert "no channel" in clock.note
    assert timeline.clock(vm).startswith("late by ")
    assert "no wall clock" in looked_after(control, "bird")[1].note


def test_an_agent_that_does_not_answer_is_said_to_be_silent(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its firmware never opens the channel. The next guest is looked after all the same."""
    monkeypatch.setattr("memconsole.backend.handoff.clocks.ANSWERS_S", 0.5)
    control.apply(do.GuestStart("vm", vmm="qemu", memory=32 * M, agent=True))
    control.apply(do.GuestPause("vm"))
    control.apply(do.HandoffRehearse())
    assert carried(control, "vm").clock is None
    control.apply(do.GuestResume("vm"))
    vm, clock = looked_after(control, "vm")
    assert "does not answer: no answer within 0.5 s" in clock.note
    assert "late by" in timeline.clock(vm)


def test_a_canary_has_no_agent(control: Control) -> None:
    with pytest.raises(Refused, match="canary has no guest agent"):
        control.apply(do.GuestStart("bird", agent=True))
