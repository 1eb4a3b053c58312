"""A domain of a real libvirtd with RAM of its own is moved live into files and started on them; killed at each step.

Its guest checks and writes its memory all the time (counting.S): whatever is killed, it runs once, on the right RAM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from support import keepers
from support.controls import runtime_dir
from support.firmware import STATUS, counting
from support.libvirt_worlds import World
from support.libvirts import COUNTING, libvirts, places
from support.services import MEMCONSOLE
from support.waiting import until

from memconsole import actions as do
from memconsole import native
from memconsole.backend.custody.holder import KeeperCustody

M = 1 << 20
UUID = "5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a12"
COPY = do.GuestAdopt("counting", copy=True)
REGION = "region:counting.pc.ram:0"


class Host(NamedTuple):
    """A libvirtd with memconsole's hook and the domain ``counting``, whose RAM is private; what its guest says."""

    world: World

    def virsh(self, *words: str) -> str:
        return self.world.manager.virsh(*words)

    def state(self) -> str:
        return self.virsh("domstate", "counting").strip()

    def pid(self) -> int:
        said = self.world.manager.run("cat", "/run/libvirt/qemu/counting.xml")
        found = re.search(r"<domstatus [^>]*pid='(\d+)'", said)
        assert found is not None
        return int(found[1])

    def left(self) -> list[str]:
        """What lies on the tmpfs of moves."""
        place = "/run/memconsole/ram"
        return self.world.manager.ended("find", place, "-mindepth", "1").stdout.split()

    def rounds(self) -> int:
        """How many rounds the guest has ended, by its QEMU's word."""
        said = self.virsh("qemu-monitor-command", "--hmp", "counting", f"xp /2wx {STATUS:#x}").split()
        assert int(said[-1], 16) == 0, "words of its memory are wrong"
        return int(said[-2], 16)

    def goes_on(self) -> None:
        begun = self.rounds()
        until(lambda: self.rounds() > begun + 1, "rounds of the guest")

    def told(self) -> tuple[int, int]:
        """Rounds that the guest has ended and words that were wrong, in what custody holds of its RAM."""
        custody = KeeperCustody(self.world.keeper)
        try:
            fd, _ = custody.get(REGION)
        finally:
            custody.close()
        rounds, wrong = struct.unpack("<II", os.pread(fd, 8, STATUS))
        os.close(fd)
        return rounds, wrong

    def runs_on_it(self, least: int) -> None:
        """The guest runs on what custody holds, has not begun anew, and nothing of it is wrong; nothing is left."""
        assert self.state() == "running"
        until(lambda: self.told()[0] > least + 1, "rounds of the guest, in custody's file")
        assert self.told()[1] == 0
        assert self.left() == []
        assert self.world.manager.ended("cat", f"/run/memconsole/libvirt/{UUID}").returncode != 0


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with libvirts(places()) as manager, runtime_dir() as runtime:
        manager.run(*MEMCONSOLE, "libvirt", "setup", "--yes")
        manager.end()
        manager.begin()
        description = manager.directory / "counting.xml"
        description.write_text(COUNTING.format(uuid=UUID, firmware=counting(manager.directory)[1]))
        manager.virsh("define", description)
        with keepers.running(native.program("memconsole-keeper")) as keeper:
            yield Host(World(manager, runtime / "run", keeper.path))


@pytest.fixture(autouse=True)
def _as_it_was(host: Host) -> Iterator[None]:
    """The domain runs on RAM of its own before each test, and memconsole has nothing after it."""
    host.virsh("start", "counting")
    until(host.rounds, "rounds of the guest")
    yield
    _, snapshot = host.world.control()
    if snapshot["guests"] and any(guest.get("adopted") for guest in snapshot["guests"]):
        host.world.control(do.GuestLetGo("counting"))
    host.world.manager.ended("virsh", "-q", "-c", "qemu:///system", "destroy", "counting")
    for region in [each["name"] for each in host.world.control()[1]["regions"]]:
        host.world.control(do.Release(region))
    assert host.world.in_custody() == []


def guests(snapshot: dict[str, Any]) -> list[str]:
    return [guest["name"] for guest in snapshot["guests"] if guest.get("adopted")]


def test_private_ram_is_refused_and_with_copy_moved_while_the_guest_runs(host: Host) -> None:
    rounds = host.rounds()
    codes, snapshot = host.world.control(do.GuestAdopt("counting"), COPY)
    assert codes == ["PrivateRam"]
    assert guests(snapshot) == ["counting"]
    host.runs_on_it(rounds)
    (region,) = snapshot["regions"]
    assert (region["name"], region["store"], region["size"]) == ("counting.pc.ram", "adopted", 32 * M)
    assert len(region["seen"]["mappers"]) == 1
    (grant,) = snapshot["grants"]
    assert (grant["gpa"], grant["length"], grant["state"]) == (0, 32 * M, "mapped")
    (told,) = [event["text"] for event in snapshot["events"] if "stood still for" in event["text"]]
    assert "last round" in told
    assert "<memoryBacking>" not in host.virsh("dumpxml", "--inactive", "counting")
    assert "mc:handoff" not in host.virsh("dumpxml", "counting")
    host.world.control(do.GuestLetGo("counting"))
    assert host.state() == "running"
    host.goes_on()


@pytest.mark.parametrize("step", ["hold", "copy"])
def test_one_that_is_cut_before_its_qemu_ends_goes_on_where_it_was(host: Host, step: str) -> None:
    pid = host.pid()
    host.world.dies(COPY, f"guest-adopt.{step}-counting.after")
    codes, snapshot = host.world.control()
    assert (codes, guests(snapshot), host.world.in_custody(), host.left()) == ([], [], [], [])
    assert host.state() == "running"
    assert host.pid() == pid
    host.goes_on()
    before = json.loads(host.virsh("qemu-monitor-command", "counting", '{"execute":"query-migrate-capabilities"}'))
    assert not [each for each in before["return"] if each["capability"] == "x-ignore-shared" and each["state"]]


def test_one_that_is_cut_when_it_is_started_stays_there(host: Host) -> None:
    rounds = host.rounds()
    host.world.dies(COPY, "guest-adopt.start-counting.after")
    _, snapshot = host.world.control()
    assert guests(snapshot) == ["counting"]
    assert host.world.in_custody() == [REGION]
    host.runs_on_it(rounds)


def test_a_libvirtd_that_is_away_after_its_qemu_ended_is_waited_for(host: Host) -> None:
    rounds = host.rounds()
    host.world.dies(COPY, "guest-adopt.end-counting.after")
    host.world.manager.end()
    _, snapshot = host.world.control()
    assert [each["id"] for each in snapshot["findings"] if each["subject"] == "counting"] == ["guest-between"]
    assert host.world.in_custody() == [REGION]
    host.world.manager.begin()
    _, snapshot = host.world.control()
    assert guests(snapshot) == ["counting"]
    host.runs_on_it(rounds)


def test_one_that_somebody_boots_meanwhile_is_never_restored(host: Host) -> None:
    host.world.dies(COPY, "guest-adopt.end-counting.after")
    host.virsh("start", "counting")
    pid = host.pid()
    _, snapshot = host.world.control()
    assert (guests(snapshot), host.world.in_custody(), host.left()) == ([], [], [])
    assert (host.state(), host.pid()) == ("running", pid)
    host.goes_on()


def test_one_that_somebody_resumes_meanwhile_goes_on_where_it_was(host: Host) -> None:
    pid = host.pid()
    host.world.dies(COPY, "guest-adopt.end-counting.before")
    host.virsh("resume", "counting")
    host.goes_on()
    _, snapshot = host.world.control()
    assert (guests(snapshot), host.world.in_custody(), host.left()) == ([], [], [])
    assert (host.state(), host.pid()) == ("running", pid)
    host.goes_on()


def test_a_qemu_that_is_killed_with_us_leaves_nothing(host: Host) -> None:
    host.world.dies(COPY, "guest-adopt.copy-counting.after")
    os.kill(host.pid(), signal.SIGKILL)
    until(lambda: host.state() != "paused", "libvirt sees that it ended")
    _, snapshot = host.world.control()
    assert (guests(snapshot), host.world.in_custody(), host.left()) == ([], [], [])
    assert host.state() == "shut off"


def test_a_paused_guest_stays_paused(host: Host) -> None:
    host.virsh("suspend", "counting")
    rounds = host.rounds()
    _, snapshot = host.world.control(COPY)
    assert guests(snapshot) == ["counting"]
    assert host.state() == "paused"
    assert host.told() == (rounds, 0)
    host.virsh("resume", "counting")
    host.runs_on_it(rounds)
