"""Guests of a real libvirtd are adopted while they run, by control processes that die in between; libvirt sees nothing.

Control processes run where libvirt's own files are, with a keeper that outlives them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import keepers
from support.controls import runtime_dir
from support.libvirt_worlds import World
from support.libvirts import libvirts
from support.waiting import until

from memconsole import actions as do
from memconsole import native

M = 1 << 20
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <memoryBacking>{backing}</memoryBacking>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <devices><memballoon model='virtio'/></devices>
</domain>
"""
BACKINGS = {
    "web shop": "<source type='memfd'/><access mode='shared'/>",
    "files": "<source type='file'/><access mode='shared'/>",
    "plain": "",
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Three domains that run: RAM in a memfd, in a file of a tmpfs, and private."""
    with libvirts() as manager, runtime_dir() as runtime:
        for name, backing in BACKINGS.items():
            description = manager.directory / "domain.xml"
            description.write_text(DOMAIN.format(name=name, backing=backing))
            manager.virsh("define", description)
            manager.virsh("start", name)
        with keepers.running(native.program("memconsole-keeper")) as keeper:
            yield World(manager, runtime / "run", keeper.path)


def adopted(snapshot: dict[str, Any]) -> list[str]:
    return sorted(guest["name"] for guest in snapshot["guests"] if guest.get("adopted"))


def inode_of(region: str, snapshot: dict[str, Any]) -> int:
    (found,) = [each for each in snapshot["regions"] if each["name"] == region]
    return int(found["segments"][0]["inode"])


def test_an_adoption_that_is_cut_anywhere_leaves_the_guest_and_nothing_in_custody(world: World) -> None:
    for step, when in (("ask", "after"), ("hold", "after"), ("join", "after")):
        world.dies(do.GuestAdopt("web shop"), f"guest-adopt.{step}-web-shop.{when}")
        _, snapshot = world.control()
        assert adopted(snapshot) == []
        assert world.in_custody() == []
    assert world.manager.virsh("domstate", "web shop").split() == ["running"]


def test_all_that_can_be_are_adopted_and_libvirt_goes_on_as_before(world: World) -> None:
    codes, snapshot = world.control(do.GuestAdopt("plain"), do.GuestAdopt(all=True))
    assert codes == ["PrivateRam"]
    assert adopted(snapshot) == ["files", "web-shop"]
    assert world.in_custody() == ["region:files.pc.ram:0", "region:web-shop.pc.ram:0"]
    for region in snapshot["regions"]:
        assert (region["store"], region["size"]) == ("adopted", 64 * M)
        assert len(region["seen"]["mappers"]) == 1
    (grant,) = [each for each in snapshot["grants"] if each["guest"] == "web-shop"]
    assert (grant["gpa"], grant["length"], grant["state"], len(grant["seen"])) == (0, 64 * M, "mapped", 1)
    guest = next(each for each in snapshot["guests"] if each["name"] == "web-shop")
    shown = os.stat(f"/proc/{guest['pid']}/fd/{memory_fd(guest['pid'])}")  # noqa: PTH116 - a link of /proc
    assert inode_of("web-shop.pc.ram", snapshot) == shown.st_ino
    world.manager.virsh("suspend", "web shop")
    _, snapshot = world.control()
    assert [each["state"] for each in snapshot["guests"] if each["name"] == "web-shop"] == ["paused"]
    world.manager.virsh("resume", "web shop")


def memory_fd(pid: int) -> str:
    """The descriptor of a QEMU's only memfd."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return next(each.name for each in links if os.readlink(each).startswith("/memfd:memory-backend"))  # noqa: PTH115


def test_a_handoff_refuses_them_by_name(world: World) -> None:
    codes, _ = world.control(do.HandoffRun(kernel="/nowhere"))
    assert {"GuestAdopted", "GuestManaged", "RegionNamed"} <= set(codes)


def test_letting_go_is_carried_through_and_the_guest_goes_on(world: World) -> None:
    world.dies(do.GuestLetGo("web-shop"), "guest-let-go.drop.after")
    _, snapshot = world.control()
    assert adopted(snapshot) == ["files"]
    assert world.in_custody() == ["region:files.pc.ram:0"]
    assert world.manager.virsh("domstate", "web shop").split() == ["running"]


def test_the_ram_of_one_that_ends_stays_in_custody_until_it_is_released(world: World) -> None:
    world.manager.virsh("destroy", "files")

    def told() -> bool:
        _, snapshot = world.control()
        return ("guest-gone", "files") in [(each["id"], each["subject"]) for each in snapshot["findings"]]

    until(told, "it is told that it is gone")
    _, snapshot = world.control(do.GuestLetGo("files"))
    assert world.in_custody() == ["region:files.pc.ram:0"]
    codes, _ = world.control(do.Release("files.pc.ram"))
    assert codes == []
    assert world.in_custody() == []
    world.manager.virsh("start", "files")
    _, snapshot = world.control(do.GuestAdopt("files"), do.GuestLetGo("files"))
    assert adopted(snapshot) == []


def test_a_libvirtd_that_does_not_answer_is_said_and_leaves_nothing(world: World) -> None:
    command = world.command((do.GuestAdopt("web shop"),))
    socket = "/run/libvirt/libvirt-sock"
    world.manager.run("mv", socket, f"{socket}.away")
    try:
        done = subprocess.run(world.manager.inside(*command), check=False, capture_output=True, text=True)
    finally:
        world.manager.run("mv", f"{socket}.away", socket)
    assert "libvirt does not hand query-migrate on" in done.stderr, (done.stdout, done.stderr)
    assert world.in_custody() == []
