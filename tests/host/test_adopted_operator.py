"""An operator with virsh in the middle of a rehearsal of adopted guests: nothing runs on wrong memory, none is lost.

What he does, he does in the control process, between two steps; the guests check their own memory all the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.adopted_worlds import UUIDS, World, adopted_world
from support.libvirts import named, versions
from support.waiting import until

from memconsole import actions as do
from memconsole.model import GuestState

soak = pytest.mark.skipif(not os.environ.get("MEMCONSOLE_SOAK"), reason="MEMCONSOLE_SOAK=1 runs it")
DISK = "<disk type='file' device='disk'><source file='{}'/><target dev='vdb' bus='virtio'/></disk>"


@pytest.fixture(scope="module", params=versions(), ids=named)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with adopted_world(request.param) as made:
        yield made


def goes_on_as_before(world: World, before: dict[str, int | None]) -> None:
    world.goes_on(*UUIDS)
    assert {name: world.guest(name).pid for name in UUIDS} == before
    assert world.notes() == []


def test_what_he_does_before_a_guest_stands_still_refuses_or_is_refused(world: World) -> None:
    """A save while RAM would be left out of it; a disk that would be in the state and not in the image's XML."""
    assert world.rehearsed("stream-gone.after", "version") == ""  # from here on its RAM are files with names
    before = {name: world.guest(name).pid for name in UUIDS}
    image = world.manager.directory / "image"
    said = world.rehearsed("set-web.after", "save", "web", image, within=30.0)
    if world.manager.newer is None:
        assert said == ""
        assert "switchover-ack" in world.said()
        assert not image.exists()
    else:  # it could have QEMU save what it leaves out, so that nothing is
        assert "guest web has ended meanwhile" in said
        assert world.restored(image)
        world.anew("web")
    world.goes_on(*UUIDS)
    before = {name: world.guest(name).pid for name in UUIDS}
    disk = world.manager.directory / "more.img"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o666)
    (world.manager.directory / "more.xml").write_text(DISK.format(disk))
    why = world.rehearsed(
        "look-web.after", "attach-device", "web", world.manager.directory / "more.xml", "--live", within=30.0
    )
    assert "guest web was changed meanwhile" in why
    goes_on_as_before(world, before)


@soak
def test_one_that_he_destroys_stays_so_and_the_others_come_back(world: World) -> None:
    assert world.rehearsed("stream-web.after", "destroy", "web", within=60.0) == ""
    assert world.state("web") == "shut off"
    report = world.snapshot().handoff
    assert report is not None
    assert {each.name: (each.back, "virsh destroy" in each.why) for each in report.guests} == {
        "web": (False, True), "files": (True, False), "gone": (True, False),
    }  # fmt: skip
    world.goes_on("files", "gone")
    assert world.notes() == []
    world.manager.virsh("start", "web")
    world.anew("web")
    why = world.rehearsed("set-web.after", "destroy", "web", within=60.0)
    assert "guest web has ended meanwhile" in why
    world.goes_on("files", "gone")
    assert world.notes() == []
    world.manager.virsh("start", "web")
    world.anew("web")


@soak
def test_one_that_he_starts_or_saves_while_it_stands_still_is_never_restored_beside(world: World) -> None:
    assert world.rehearsed("stream-files.after", "managedsave", "files") == ""
    world.goes_on(*UUIDS)
    assert world.manager.virsh("list", "--all", "--with-managed-save", "--name").split() == []
    assert world.rehearsed("end-web.after", "start", "web", within=60.0) == ""
    assert world.state("web") == "running"
    world.goes_on("files", "gone")
    until(lambda: world.guest("web").state is GuestState.GONE, "the guest that was is shown to be gone")
    world.anew("web")
    world.goes_on("web")
    assert world.notes() == []


@soak
def test_what_he_saves_and_restores_is_adopted_anew_before_a_handoff_takes_it(world: World) -> None:
    image = world.manager.directory / "image"
    world.manager.virsh("save", "web", image)
    world.manager.virsh("restore", image)
    image.unlink()
    until(lambda: world.guest("web").state is GuestState.GONE, "the guest that was is shown to be gone")
    for action in (do.HandoffRehearse(), do.HandoffRun(kernel="/nowhere")):
        (condition,) = [each for each in world.plan(action).conditions if each.id == "guest-adopted"]
        assert not condition.ok
        assert "libvirt has started it again on other RAM" in condition.observed
        assert "memconsole release web.pc.ram; memconsole guest adopt web" in condition.observed
    assert [each.code for each in world.plan(do.GuestAdopt(all=True)).refusals] == ["GuestGone"]
    pid = int(world.manager.run("cat", "/run/libvirt/qemu/web.pid"))
    assert world.rehearsed("stream-gone.after", "version") == ""  # the others are carried, it is left alone
    assert Path(f"/proc/{pid}").exists()
    world.anew("web")
    world.goes_on("web")


@soak
def test_a_rehearsal_right_after_another_is_as_good_whatever_he_asks_meanwhile(world: World) -> None:
    for _ in range(2):
        assert world.rehearsed("stream-web.after", "setmem", "web", "16M", "--live") == ""
        world.goes_on(*UUIDS)
