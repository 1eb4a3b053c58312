"""A libvirtd with a service of memconsole beside it, and domains that check their own memory, adopted."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from memconsole import actions as do
from memconsole.backend.managers import plans, saveimage
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import Guest, Plan, Snapshot
from support.firmware import STATUS, counting
from support.libvirts import Libvirt, libvirts, places
from support.services import MEMCONSOLE, Service
from support.waiting import LONG_S, until

M = 1 << 20
OPERATED = """
import json, os, subprocess, sys
from pathlib import Path
from memconsole.backend import steps
from memconsole.cli import main

told = Path({told!r})
kills = steps.point

def point(name):
    if told.exists() and json.loads(told.read_text())["point"] == name:
        words, within = json.loads(told.read_text())["words"], json.loads(told.read_text())["within"]
        told.unlink()
        with told.with_suffix(".out").open("wb") as out:
            done = subprocess.Popen(["virsh", "-q", "-c", "qemu:///system", *words], stdout=out, stderr=out)
            try:
                done.wait(within)
            except subprocess.TimeoutExpired:
                pass  # libvirt waits for a QEMU that stands still
    kills(name)

steps.point = point
sys.exit(main(sys.argv[4:]))
"""
"""A service in which an operator does something with virsh at a fault point, as a file tells it."""
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

    @property
    def _told(self) -> Path:
        return self.manager.directory / "told.json"

    def begin(self, fault: str = "") -> Client:
        """A control process."""
        if self.client is not None:
            self.client.close()
        operated = OPERATED.format(told=str(self._told))
        launcher = [*(str(word) for word in self.manager.inside()), sys.executable, "-c", operated]
        self.service.start("--mount", launcher=launcher, env={FAULT_VARIABLE: fault})
        self.client = self.service.client()
        return self.client

    def again(self, fault: str = "") -> Client:
        """The next control process, once this one has ended."""
        assert self.service.process is not None
        self.service.process.communicate(timeout=LONG_S)
        return self.begin(fault)

    def rehearsed(self, point: str, *words: str | Path, within: float = 2.0) -> str:
        """A rehearsal in which an operator does this at a point; why it failed, or nothing."""
        told = {"point": f"handoff-rehearse.{point}", "words": [str(word) for word in words], "within": within}
        self._told.write_text(json.dumps(told))
        try:
            self.apply(do.HandoffRehearse())
        except MemconsoleError as error:
            return str(error)
        finally:
            assert not self._told.exists(), point
        return ""

    def said(self) -> str:
        """What virsh has said to the operator."""
        return self._told.with_suffix(".out").read_text()

    def anew(self, name: str) -> None:
        """Adopt a guest as it runs now, by what the check says."""
        plan = self.plan(do.GuestAdopt(name))
        (refusal,) = plan.refusals
        assert refusal.code == "GuestGone"
        for words in refusal.remedy.partition(": ")[2].split("; "):
            self.manager.run(*self.service.command(*words.split()[1:], *([] if "adopt" in words else ["--yes"])))

    def plan(self, action: do.Action) -> Plan:
        assert self.client is not None
        return self.client.plan(action)

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
        return self.restored(image)

    def restored(self, image: Path) -> bool:
        """Restore an image that an operator saved; whether it had all of the RAM, and was like any other."""
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


@contextlib.contextmanager
def adopted_world(newer: Path | None = None) -> Iterator[World]:
    """Three domains that are adopted: ``web`` (memfd), ``files`` (a file, emptied at its end), ``gone`` (transient)."""
    with libvirts(places(), newer) as manager:
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
