"""Guests of a real libvirtd, as memconsole sees them beside it: nothing is asked of libvirt, nothing of it changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.libvirts import Libvirt, libvirts
from support.waiting import until

M = 1 << 20
NAME = "web shop"
DOMAIN = """<domain type='qemu'>
  <name>web shop</name>
  <title>Web shop (blue)</title>
  <memory unit='MiB'>128</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu placement='static'>2</vcpu>
  <cputune><vcpupin vcpu='0' cpuset='0'/></cputune>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <cpu><numa><cell id='0' cpus='0' memory='64' unit='MiB'/><cell id='1' cpus='1' memory='64' unit='MiB'/></numa></cpu>
  <devices>
    <disk type='file' device='disk'><source file='{disk}'/><target dev='vda' bus='virtio'/></disk>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""
MEMCONSOLE = (sys.executable, "-c", "import sys; from memconsole.cli import main; sys.exit(main(sys.argv[1:]))")


@pytest.fixture(scope="module")
def manager() -> Iterator[Libvirt]:
    """A libvirtd with a domain ``web shop`` that runs, of two NUMA cells."""
    with libvirts(["/run/user"]) as manager:
        disk = manager.directory / "disk.img"
        disk.write_bytes(bytes(M))
        disk.chmod(0o666)
        description = manager.directory / "domain.xml"
        description.write_text(DOMAIN.format(disk=disk))
        manager.virsh("define", description)
        manager.virsh("start", NAME)
        yield manager


def seen(manager: Libvirt) -> list[dict[str, Any]]:
    """The guests of memconsole's Snapshot, read where libvirt's own files are."""
    snapshot = json.loads(manager.run(*MEMCONSOLE, "--embedded", "snapshot"))
    return [guest for guest in snapshot["guests"] if guest.get("managed")]


def test_a_domain_is_a_guest_with_what_belongs_to_it(manager: Libvirt) -> None:
    (guest,) = seen(manager)
    managed = guest["managed"]
    assert (guest["name"], guest["kind"], guest["state"]) == (NAME, "foreign", "running")
    assert managed["uuid"] == manager.virsh("domuuid", NAME).strip()
    assert (managed["manager"], managed["title"], managed["persistent"]) == ("libvirt", "Web shop (blue)", True)
    threads = {int(path.name) for path in Path(f"/proc/{guest['pid']}/task").iterdir()}
    vcpus = [vcpu["tid"] for vcpu in guest["seen"]["vcpus"]]
    assert len(vcpus) == 2
    assert set(vcpus) <= threads
    assert [vcpu["cpus"] for vcpu in managed["vcpus"]] == ["0", ""]
    assert [cell["size"] for cell in managed["cells"]] == [64 * M, 64 * M]
    assert [disk["target"] for disk in managed["disks"]] == ["vda"]
    assert managed["ram"]["backing"] == "memfd"


def test_what_an_operator_does_with_virsh_is_seen_at_once(manager: Libvirt) -> None:
    manager.virsh("suspend", NAME)
    assert [(guest["state"], guest["managed"]["reason"]) for guest in seen(manager)] == [("paused", "user")]
    manager.virsh("resume", NAME)
    assert [guest["state"] for guest in seen(manager)] == ["running"]
    manager.virsh("autostart", NAME)
    assert seen(manager)[0]["managed"]["autostart"] is True


def test_it_is_found_by_its_manager_in_the_listing(manager: Libvirt) -> None:
    words = ("guests", "--where", "manager:libvirt", "--columns", "name,manager,title")
    assert "Web shop (blue)" in manager.run(*MEMCONSOLE, "--embedded", *words)


def test_a_domain_that_ended_is_no_guest_any_more(manager: Libvirt) -> None:
    manager.virsh("destroy", NAME)
    until(lambda: not seen(manager), "it is gone")
    manager.virsh("start", NAME)
    assert [guest["name"] for guest in seen(manager)] == [NAME]


USER = 65534
SESSION = """<domain type='qemu'>
  <name>own</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
</domain>
"""


def as_user(home: str, *words: str) -> tuple[str, ...]:
    """A command as that user, who has a session of his own."""
    place = f"/run/user/{USER}"
    own = (f"HOME={home}", f"XDG_RUNTIME_DIR={place}", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C")
    return ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "env", "-i", *own, *words)


@pytest.fixture
def own(manager: Libvirt) -> Iterator[tuple[str, ...]]:
    """virsh of a user whose session daemon runs a domain."""
    manager.run("mount", "-t", "tmpfs", "none", "/run/user")
    home = f"/run/user/{USER}/home"
    manager.run("mkdir", "-p", home)
    manager.run("chown", "-R", f"{USER}:{USER}", f"/run/user/{USER}")
    description = manager.directory / "own.xml"
    description.write_text(SESSION)
    description.chmod(0o644)
    manager.directory.chmod(0o755)
    virsh = as_user(home, "virsh", "-q", "-c", "qemu:///session")
    try:
        with (manager.directory / "session.log").open("wb") as log:
            words = manager.inside(*as_user(home, "libvirtd", "-t", "20"))
            daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            until(lambda: manager.ended(*virsh, "list").returncode == 0, "the session daemon answers")
            manager.run(*virsh, "create", str(description))
            yield virsh
            manager.ended(*virsh, "destroy", "own")
            daemon.terminate()
            daemon.wait()
    finally:
        manager.run("umount", "-l", "/run/user")


def test_a_domain_of_a_users_session_daemon_is_that_users_guest(manager: Libvirt, own: tuple[str, ...]) -> None:
    found = {guest["name"]: guest for guest in seen(manager)}
    assert set(found) == {NAME, f"own@{USER}"}
    guest = found[f"own@{USER}"]
    assert (guest["managed"]["user"], guest["managed"]["state"], guest["seen"]["uid"]) == (USER, "running", USER)
    assert guest["managed"]["uuid"] == manager.run(*own, "domuuid", "own").strip()
    refused = manager.ended(*MEMCONSOLE, "--embedded", "guest", "adopt", f"own@{USER}", "--dry-run")
    assert "qemu:///system" in refused.stdout + refused.stderr
    manager.run(*own, "destroy", "own")
    until(lambda: [guest["name"] for guest in seen(manager)] == [NAME], "it is gone")
