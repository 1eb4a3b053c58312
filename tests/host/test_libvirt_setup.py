"""libvirt's hook in a real libvirtd: planned RAM is linked, an image without its RAM is refused, others go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.firmware import STATUS, counting
from support.libvirts import COUNTING, Libvirt, libvirts, places
from support.services import MEMCONSOLE
from support.waiting import until

from memconsole.backend import steps
from memconsole.backend.guests.statestream import StateStream
from memconsole.backend.managers import domainxml, plans, saveimage, virsh
from memconsole.backend.managers.migration import Elsewhere

M = 1 << 20
UUID = "5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a11"
OTHER = "0f0c5b8e-63a4-4f2b-9d5e-2b9a7a3d7c22"
DIGEST = "0123456789abcdef" * 4
DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <memoryBacking><source type='{source}'/><access mode='shared'/></memoryBacking>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
</domain>
"""
OPERATORS = '#!/bin/sh\necho "$1 $2 $3" >>/var/log/libvirt/operator\n'


class Host:
    """A libvirtd, and memconsole's files beside it: ``runtime`` is what the hook has at /run/memconsole."""

    def __init__(self, manager: Libvirt) -> None:
        self.manager = manager
        self.runtime = manager.directory / "over/run/memconsole"
        self.ram = manager.directory / "ram"

    def memconsole(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of memconsole, where libvirt's own files are."""
        return self.manager.ended(*MEMCONSOLE, *words)

    def states(self) -> dict[str, str]:
        """How each part of the configuration stands."""
        parts: list[dict[str, Any]] = json.loads(self.memconsole("libvirt", "status", "--json").stdout)
        return {part["id"]: part["state"] for part in parts}

    def plan(self) -> None:
        """RAM of its own for the domain ``web``."""
        self.ram.write_bytes(bytes(32 * M))
        self.ram.chmod(0o666)
        plans.write(UUID, {"pc.ram": self.ram}, self.runtime)

    def maps(self, name: str) -> str:
        """The memory map of a domain's QEMU."""
        status = self.manager.run("cat", f"/run/libvirt/qemu/{name}.xml")
        found = re.search(r"<domstatus [^>]*pid='(\d+)'", status)
        assert found is not None
        return Path(f"/proc/{found[1]}/maps").read_text()

    def locked(self) -> Path:
        """An image of the domain ``web``, which runs, with memconsole's lock in its metadata."""
        image, text = self.manager.directory / "web.image", self.manager.directory / "web.xml"
        self.manager.virsh("save", "web", image)
        said = self.manager.virsh("save-image-dumpxml", image, "--security-info")
        text.write_bytes(domainxml.locked(said.encode(), domainxml.Lock("web", DIGEST)))
        self.manager.virsh("save-image-define", image, text)
        return image


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """A libvirtd with an operator's hook and memconsole's, and the domains ``web`` and ``other``, which do not run."""
    with libvirts(places()) as manager:
        hooks = manager.directory / "etc/hooks"
        hooks.mkdir()
        host = Host(manager)
        made = host.memconsole("libvirt", "setup", "--yes")
        assert made.returncode == 0, made.stderr
        assert "then: systemctl restart libvirtd.service" in made.stdout
        assert host.states()["daemon-libvirtd"] == "stale"
        (hooks / "qemu").write_text(OPERATORS)
        (hooks / "qemu").chmod(0o755)
        manager.end()
        manager.begin()
        for name, uuid, source in (("web", UUID, "file"), ("other", OTHER, "memfd")):
            description = manager.directory / f"{name}.xml"
            description.write_text(DOMAIN.format(name=name, uuid=uuid, source=source))
            manager.virsh("define", description)
        yield host


@pytest.fixture(autouse=True)
def _nothing_runs(host: Host) -> Iterator[None]:
    yield
    for name in host.manager.virsh("list", "--name").split():
        host.manager.virsh("destroy", name)
    plans.remove(UUID, host.runtime)


def test_a_daemon_that_was_restarted_calls_both_hooks(host: Host) -> None:
    assert set(host.states().values()) == {"there"}
    assert host.memconsole("libvirt", "status").returncode == 0
    host.manager.virsh("start", "other")
    assert "other start begin" in host.manager.run("cat", "/var/log/libvirt/operator")


def test_a_domain_gets_the_ram_that_was_planned_and_another_its_own(host: Host) -> None:
    host.plan()
    host.manager.virsh("start", "web")
    host.manager.virsh("start", "other")
    assert f" {host.ram}\n" in host.maps("web")
    assert str(host.ram) not in host.maps("other")
    host.manager.virsh("destroy", "web")
    assert host.ram.stat().st_size == 32 * M


def test_a_domain_whose_planned_ram_is_gone_starts_on_ordinary_memory(host: Host) -> None:
    host.plan()
    host.ram.unlink()
    host.manager.virsh("start", "web")
    assert "libvirt/qemu/" in host.maps("web")
    assert str(host.ram) not in host.maps("web")


def test_a_locked_image_is_restored_on_its_ram_alone_and_once(host: Host) -> None:
    host.plan()
    host.manager.virsh("start", "web")
    image = host.locked()
    copy = host.manager.directory / "again.image"
    copy.write_bytes(image.read_bytes())

    refused = host.manager.ended("virsh", "-q", "-c", "qemu:///system", "restore", image)
    assert refused.returncode != 0
    assert "memconsole: the RAM of web is not here" in refused.stderr
    plans.verified(UUID, "f" * 64, host.runtime)
    refused = host.manager.ended("virsh", "-q", "-c", "qemu:///system", "restore", image)
    assert "memconsole: the RAM of web is not here" in refused.stderr

    plans.verified(UUID, DIGEST, host.runtime)
    host.manager.virsh("restore", image)
    assert f" {host.ram}\n" in host.maps("web")
    assert host.manager.virsh("domstate", "web").strip() == "running"
    assert not plans.is_verified(UUID, host.runtime)
    assert "mc:handoff" not in host.manager.virsh("dumpxml", "web")

    host.manager.virsh("destroy", "web")
    refused = host.manager.ended("virsh", "-q", "-c", "qemu:///system", "restore", copy)
    assert "memconsole: the RAM of web is not here" in refused.stderr


def test_an_image_that_an_operator_saves_later_is_like_any_other(host: Host) -> None:
    host.plan()
    host.manager.virsh("start", "web")
    image = host.locked()
    plans.verified(UUID, DIGEST, host.runtime)
    host.manager.virsh("restore", image)
    host.manager.virsh("save", "web", host.manager.directory / "later.image")
    host.manager.virsh("restore", host.manager.directory / "later.image")
    assert f" {host.ram}\n" in host.maps("web")


def test_a_restore_that_failed_before_the_guest_ran_may_be_tried_again(host: Host) -> None:
    host.plan()
    host.manager.virsh("start", "web")
    image = host.locked()
    plans.verified(UUID, DIGEST, host.runtime)
    host.ram.chmod(0o000)
    host.ram.chmod(0o600)  # it is there, and QEMU, which is not root, may not open it
    refused = host.manager.ended("virsh", "-q", "-c", "qemu:///system", "restore", image)
    assert refused.returncode != 0
    assert "memconsole" not in refused.stderr
    assert plans.is_verified(UUID, host.runtime)
    host.ram.chmod(0o666)
    host.manager.virsh("restore", image)
    assert f" {host.ram}\n" in host.maps("web")


def test_an_ordinary_domain_is_started_when_nothing_of_memconsole_is_left_but_the_hook(host: Host) -> None:
    assert not plans.planned(host.runtime)
    for name in ("web", "other"):
        host.manager.virsh("start", name)
        host.manager.virsh("save", name, host.manager.directory / f"{name}.whole")
        host.manager.virsh("restore", host.manager.directory / f"{name}.whole")


@pytest.fixture
def ask(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> virsh.Monitor:
    """The monitor of the domain with the UUID, by a virsh that runs where libvirt is."""
    words = " ".join(map(str, host.manager.inside(shutil.which("virsh") or "virsh")))
    (tmp_path / "virsh").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (tmp_path / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return virsh.monitor(UUID)


def take(taking: StateStream) -> None:
    for _ in steps.run("take", taking.steps()):
        pass


def told(fd: int) -> tuple[int, int]:
    """Rounds that the guest has ended, and words that were wrong."""
    rounds, wrong = struct.unpack("<II", os.pread(fd, 8, STATUS))
    return rounds, wrong


def test_a_guest_with_ram_of_its_own_is_moved_live_into_a_file_and_restored_on_it(
    host: Host, ask: virsh.Monitor
) -> None:
    """Taken, taken back, and taken again; refused without its RAM and while it is locked; nothing is wrong in it."""
    manager, directory = host.manager, host.manager.directory
    (directory / "counting.xml").write_text(COUNTING.format(uuid=UUID, firmware=counting(directory)[1]))
    manager.virsh("undefine", "web")  # it has its UUID
    manager.virsh("define", directory / "counting.xml")
    manager.virsh("start", "counting")
    looked = {"command-line": f"xp /1wx {STATUS:#x}"}
    until(lambda: int(str(ask("human-monitor-command", looked)).split()[-1], 16), "rounds of the guest")
    host.plan()
    blocks = (Elsewhere("pc.ram", 32 * M, os.open(host.ram, os.O_RDWR | os.O_CLOEXEC)),)
    pid = int(manager.run("cat", "/run/libvirt/qemu/counting.pid"))
    xml = manager.virsh("dumpxml", "--migratable", "--security-info", "counting").strip().encode()
    lock = domainxml.Lock("counting", DIGEST)
    image, unlocked, whole = (directory / name for name in ("locked", "unlocked", "whole"))
    with image.open("w+b", buffering=0) as file:
        saveimage.begin(file.fileno(), saveimage.Image(True, domainxml.locked(domainxml.on_files(xml), lock)))
        taking = StateStream("counting", pid, ask, file.fileno(), blocks)
        take(taking)
        assert manager.virsh("domstate", "counting").strip() == "paused"
        for step in reversed(taking.steps()):
            if step.undo is not None:
                step.undo()
        until(lambda: manager.virsh("domstate", "counting").strip() == "running", "it runs again, and libvirt knows")
        take(taking)
        saveimage.finish(file.fileno())
        manager.virsh("destroy", "counting")
        ram = blocks[0].fd
        rounds, wrong = told(ram)
        assert (rounds > 0, wrong) == (True, 0)
        saveimage.unlock(file.fileno(), unlocked, (Elsewhere("pc.ram", 32 * M),), digest=DIGEST)
    restore = ("virsh", "-q", "-c", "qemu:///system", "restore")
    assert "is not here" in manager.ended(*restore, unlocked).stderr
    plans.verified(UUID, DIGEST, host.runtime)
    refused = manager.ended(*restore, image).stderr  # of which a newer libvirt says less
    assert "received capability is on" in refused or "load of migration failed: Invalid argument" in refused
    manager.run(*restore, unlocked)
    assert manager.virsh("domstate", "counting").strip() == "running"
    until(lambda: told(ram)[0] > rounds + 2, "rounds of the guest that was restored")
    assert told(ram)[1] == 0
    os.close(ram)
    manager.virsh("save", "counting", whole)
    with whole.open("rb", buffering=0) as file:
        found = saveimage.examine(file.fileno())
    assert found.image.lock is None
    assert found.stream is not None
    assert not found.stream.was_locked
    assert {block.name: block.kept for block in found.stream.blocks}["pc.ram"] >= 32 * M // 4096


def test_what_is_removed_leaves_the_operators_hook_and_nothing_else(host: Host) -> None:
    host.plan()
    refused = host.memconsole("libvirt", "remove", "--yes")
    assert refused.returncode == 3
    assert UUID in refused.stderr
    plans.remove(UUID, host.runtime)
    assert host.memconsole("libvirt", "remove", "--yes").returncode == 0
    left = list((host.manager.directory / "etc/hooks").rglob("*"))
    assert [path.name for path in left] == ["qemu"]
    assert not [*(host.manager.directory / "over/etc").rglob("*.conf")]
    host.manager.virsh("start", "other")
