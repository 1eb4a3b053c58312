"""Adopted guests of a real libvirtd through rehearsals of a handoff: state without RAM, managed again, never twice.

Their guests check their own memory, round after round; libvirtd, hook and control process run in one namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from support.adopted_worlds import DOMAIN, UUIDS, World, adopted_world
from support.faultpoints import fault_points
from support.firmware import counting
from support.libvirts import named, versions
from support.waiting import until

from memconsole import actions as do
from memconsole.errors import MemconsoleError
from memconsole.model import GuestState, HandoffState


@pytest.fixture(scope="module", params=versions(), ids=named)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with adopted_world(request.param) as made:
        yield made


def test_a_rehearsal_ends_every_qemu_and_libvirt_starts_each_as_it_was(world: World) -> None:
    world.manager.virsh("suspend", "gone")
    before = {name: world.guest(name).pid for name in UUIDS}
    assert world.client is not None
    plan = world.client.plan(do.HandoffRehearse())
    assert not plan.refusals
    assert next(each for each in plan.conditions if each.id == "guest-adopted").ok
    world.apply(do.HandoffRehearse())
    report = world.snapshot().handoff
    assert report is not None
    assert report.state is HandoffState.DONE
    results = {each.name: each for each in report.guests}
    assert {name: (each.back, each.why) for name, each in results.items()} == dict.fromkeys(UUIDS, (True, ""))
    assert all(each.blackout_ns and each.lane for each in results.values())
    world.goes_on("web", "files")
    assert world.state("gone") == "paused"
    world.manager.virsh("resume", "gone")
    world.goes_on("gone")
    for name in UUIDS:
        now = world.guest(name)
        assert now.pid not in {None, before[name]}
        until(lambda name=name: world.guest(name).state is GuestState.RUNNING, f"{name} is shown to run")  # type: ignore[misc]
    assert world.notes() == []
    assert world.manager.virsh("list", "--all", "--with-managed-save", "--name").split() == []
    assert set(world.manager.virsh("list", "--persistent", "--name").split()) == {"web", "files"}


def test_a_libvirtd_that_is_away_after_we_were_killed_is_waited_for(world: World) -> None:
    """Its state was taken and it stands still; nobody starts it twice, and it goes on once libvirtd is back."""
    before = {name: world.guest(name).pid for name in UUIDS}
    assert world.service.process is not None
    world.service.end(signal.SIGTERM)
    world.begin("handoff-rehearse.stream-web.after")
    with contextlib.suppress(MemconsoleError):
        world.apply(do.HandoffRehearse())
    world.manager.end()
    world.again()
    assert world.state("web") == ""  # libvirt does not answer
    world.manager.begin()
    world.goes_on(*UUIDS)
    assert {name: world.guest(name).pid for name in UUIDS} == before


def test_whatever_fails_they_run_as_before_and_their_next_save_is_whole(world: World) -> None:
    """Killed at points of the steps that change a guest; with MEMCONSOLE_SOAK=1 at every point."""
    assert world.client is not None
    points = [each for each in fault_points(world.client.plan(do.HandoffRehearse())) if each.split(".")[1] != "check"]
    assert {f"handoff-rehearse.{step}-web.after" for step in ("look", "set", "stream", "end")} <= set(points)
    if not os.environ.get("MEMCONSOLE_SOAK"):
        points = ["handoff-rehearse.stream-web.after", "handoff-rehearse.end-web.after"]
    else:
        points += [f"guest-resume.{step}.{when}" for step in ("offer", "start") for when in ("before", "after")]
    for point in points:
        assert world.service.process is not None
        world.service.end(signal.SIGTERM)
        world.begin(point)
        with contextlib.suppress(MemconsoleError):
            world.apply(do.HandoffRehearse())
        world.again()
        until(lambda: world.notes() == [], f"nothing waits after {point}")
        world.goes_on(*UUIDS)
    assert world.is_whole("web")


def test_a_domain_that_starts_and_ends_between_two_looks_is_told_at_once(world: World) -> None:
    """A subscriber who wants a Snapshot an hour gets one when a domain starts, and the next when it has ended."""
    description = world.manager.directory / "brief.xml"
    uuid = "5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a77"
    firmware = counting(world.manager.directory)[1]
    description.write_text(DOMAIN.format(name="brief", uuid=uuid, source="memfd", more="", cells="", firmware=firmware))
    told = world.manager.directory / "told"
    words = world.service.command("watch", "--every", "3600")

    def told_of_it() -> bool:
        world.manager.virsh("create", description)
        world.manager.virsh("destroy", "brief")
        text = told.read_text()
        return "libvirt has started brief" in text and "brief of libvirt has ended" in text

    with told.open("wb") as out, subprocess.Popen(world.manager.inside(*words), stdout=out) as watching:
        try:
            until(told_of_it, "who watches is told that it has started, and ended")
        finally:
            watching.terminate()
