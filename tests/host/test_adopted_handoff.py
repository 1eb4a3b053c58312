"""Adopted guests of a real libvirtd through rehearsals of a handoff: state without RAM, managed again, never twice.

Their guests check their own memory, round after round; libvirtd, hook and control process run in one namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
from collections.abc import Iterator

import pytest
from support.faultpoints import fault_points
from support.firmware import STATUS, counting
from support.libvirts import Libvirt, libvirts, places
from support.services import MEMCONSOLE, Service
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.backend.managers import plans, saveimage
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import Guest, GuestState, HandoffState, Snapshot

M = 1 << 20
UUIDS = {name: f"5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a{n:02x}" for n, name in enumerate(("web", "files", "gone"))}
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <memoryBacking><source type='{source}'/><access mode='shared'/>{more}</memoryBacking>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{firmware}</loader></os>
  <features><acpi/></features>
  {cells}
</domain>
"""
CELL = "<cell id='{0}' cpus='{0}' memory='16' unit='MiB'/>"
CELLS = f"<cpu><numa>{CELL.format(0)}{CELL.format(1)}</numa></cpu>"


class World:
    """A libvirtd with its domains, and the control process beside it."""

    def __init__(self, manager: Libvirt) -> None:
        self.manager = manager
        self.service = Service(manager.directory)
        self.service.runtime = manager.directory / "over/run/memconsole"
        self.service.path = self.service.runtime / "control"
        self.client: Client | None = None

    def setup(self) -> None:
        """libvirt's hook, the domains, and a service with a mount."""
        (self.manager.directory / "etc/hooks").mkdir()
        self.manager.run(*MEMCONSOLE, "libvirt", "setup", "--yes")
        self.manager.end()
        self.manager.begin()
        firmware = counting(self.manager.directory)[1]
        for name, source, more, cells, make in (
            ("web", "memfd", "", "", "define"),
            ("files", "file", "<discard/>", CELLS, "define"),
            ("gone", "memfd", "", CELLS, "create"),
        ):
            words = {"name": name, "uuid": UUIDS[name], "source": source, "more": more, "cells": cells}
            text = DOMAIN.format(**words, firmware=firmware)
            (self.manager.directory / "domain.xml").write_text(text)
            self.manager.virsh(make, self.manager.directory / "domain.xml")
            if make == "define":
                self.manager.virsh("start", name)
        self.begin()

    def begin(self, fault: str = "") -> Client:
        """A control process."""
        if self.client is not None:
            self.client.close()
        launcher = [str(word) for word in self.manager.inside()]
        self.service.start("--mount", launcher=launcher, env={FAULT_VARIABLE: fault})
        self.client = self.service.client()
        return self.client

    def again(self, fault: str = "") -> Client:
        """The next control process, once this one has ended."""
        assert self.service.process is not None
        self.service.process.communicate(timeout=LONG_S)
        return self.begin(fault)

    def apply(self, action: do.Action) -> None:
        assert self.client is not None
        self.client.apply(action)

    def snapshot(self) -> Snapshot:
        """One of now: on a busy host the last there is may be answered, which says so."""
        assert self.client is not None
        found: list[Snapshot] = []

        def is_of_now() -> bool:
            assert self.client is not None
            found[:] = [self.client.snapshot()]
            return not any(each.id == "snapshot-old" for each in found[0].findings)

        until(is_of_now, "a Snapshot of now")
        return found[0]

    def guest(self, name: str) -> Guest:
        return next(each for each in self.snapshot().guests if each.name == name)

    def state(self, name: str) -> str:
        """As libvirt says."""
        return self.manager.ended("virsh", "-q", "-c", "qemu:///system", "domstate", name).stdout.strip()

    def told(self, name: str) -> tuple[int, int]:
        """Rounds that a guest has ended, and words that were wrong, from its RAM in custody."""
        assert self.client is not None
        (fd,) = self.client.open_region(f"{name}.{'pc.ram' if name == 'web' else 'ram-node0'}")
        try:
            rounds, wrong = struct.unpack("<II", os.pread(fd, 8, STATUS))
            return rounds, wrong
        finally:
            os.close(fd)

    def goes_on(self, *names: str) -> None:
        """Each ends more rounds, and finds nothing wrong."""
        before = {name: self.told(name)[0] for name in names}
        for name in names:
            until(lambda name=name: self.told(name)[0] > before[name] + 1, f"rounds of {name}")  # type: ignore[misc]
            assert self.told(name)[1] == 0
            assert self.state(name) == "running"

    def is_whole(self, name: str) -> bool:
        """Whether the next image that an operator saves has all of its RAM, and is like any other."""
        image = self.manager.directory / "whole"
        self.manager.virsh("save", name, image)
        with image.open("rb", buffering=0) as file:
            found = saveimage.examine(file.fileno())
        self.manager.virsh("restore", image)
        image.unlink()
        assert found.stream is not None
        assert found.image.lock is None
        return {each.name: each.kept for each in found.stream.blocks}["pc.ram"] >= 32 * M // 4096

    def notes(self) -> list[str]:
        """What custody has of carried guests, and plans of RAM."""
        waiting = [each.subject for each in self.snapshot().findings if each.id == "handoff-guest-held"]
        return [*waiting, *plans.planned(self.service.runtime)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with libvirts(places()) as manager:
        made = World(manager)
        try:
            made.setup()
            made.apply(do.GuestAdopt(all=True))
            yield made
        finally:
            for name in UUIDS:
                manager.ended("virsh", "-q", "-c", "qemu:///system", "destroy", name)
            if made.client is not None:
                made.client.close()
            made.service.clean()
            manager.ended("umount", "--all-targets", made.service.runtime / "mount/tree")


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
