"""The fast lane on a real libvirtd: memconsole-resume starts its QEMU while it is away, and it finds it running.

No kernel is booted: a control process dies once all is written down, libvirtd ends, and so does the QEMU, as with
their kernel; what was in /run of libvirt's is gone. In a rehearsal this lane is none, so these tests have it be one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import adopted_worlds
from support.adopted_worlds import World
from support.firmware import counting
from support.libvirts import libvirts, named, places, versions
from support.services import MEMCONSOLE
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.handoff import fast
from memconsole.errors import MemconsoleError
from memconsole.model import GuestResult
from memconsole.native import program

pytestmark = pytest.mark.skipif(
    not os.environ.get("MEMCONSOLE_SOAK"),
    reason="MEMCONSOLE_SOAK=1 runs it: without a jump a busy kernel may move the pages meanwhile",
)
UUID = "5d5b5d26-0c46-4d3f-9a58-6b8c3d9c0a78"
IN_REHEARSALS = """
import dataclasses
from memconsole.backend.handoff import carried, carried_back, facts

def in_its_lane(desk, met, lacks, *, jump):
    return dataclasses.replace(met, slow=carried.slow(desk, met.guest, lacks)) if met.is_carried else met

facts._in_its_lane = in_its_lane
carried_back._jumped = lambda desk, said: bool(said.digest)
"""
DOMAIN = """<domain type='qemu'>
  <name>web</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{firmware}</loader></os>
  <features><acpi/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='pty'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc' port='-1' autoport='yes' listen='127.0.0.1'/>
    <video><model type='vga'/></video>
  </devices>
</domain>
"""


class Crossing(World):
    """A domain that is adopted, and what a jump does to it and to libvirtd."""

    @property
    def disk(self) -> Path:
        return self.manager.directory / "disk.img"

    def prepare(self) -> None:
        (self.manager.directory / "etc/hooks").mkdir()
        self.manager.run(*MEMCONSOLE, "libvirt", "setup", "--yes")
        self.manager.end()
        self.manager.begin()
        firmware = counting(self.manager.directory)[1]
        self.disk.write_bytes(bytes(1 << 20))
        description = self.manager.directory / "domain.xml"
        description.write_text(DOMAIN.format(uuid=UUID, firmware=firmware, disk=self.disk))
        self.manager.virsh("define", description)
        self.manager.virsh("autostart", "web")
        self.begin()

    def adopt(self) -> int:
        """Start it anew and adopt it; its PID."""
        self.manager.virsh("start", "web")
        self.apply(do.GuestAdopt("web"))
        return self.pid()

    def pid(self) -> int:
        return int(self.manager.run("cat", "/run/libvirt/qemu/web.pid"))

    def qemus(self) -> list[int]:
        """Those of the domain, whoever started them."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if UUID.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def cross(self) -> None:
        """All is written down, the control process ends; then what a kernel's end is to libvirt and its QEMU."""
        before = self.pid()
        assert self.service.process is not None
        self.service.end(signal.SIGTERM)
        self.begin("handoff-rehearse.manifest.after")
        with contextlib.suppress(MemconsoleError):
            self.apply(do.HandoffRehearse())
        self.service.process.communicate(timeout=60)
        self.manager.end()
        os.kill(before, signal.SIGKILL)
        until(lambda: not self.qemus(), "its QEMU has ended")
        self.manager.run("sh", "-c", "rm -r /run/libvirt/qemu /var/lib/libvirt/qemu/domain-*")
        for note in os.listxattr(self.disk):  # of who uses it, with the time of the boot: no later one counts them
            if note.startswith("trusted.libvirt."):
                os.removexattr(self.disk, note)

    def resume(self) -> subprocess.CompletedProcess[str]:
        runtime = self.service.runtime.absolute()
        return self.manager.ended(program("memconsole-resume"), "--rehearse", "--runtime", runtime)

    def result(self) -> GuestResult:
        made = self.snapshot().handoff
        assert made is not None
        return made.guests[0]


@pytest.fixture(scope="module", params=versions(), ids=named)
def world(request: pytest.FixtureRequest) -> Iterator[Crossing]:
    with pytest.MonkeyPatch.context() as patch, libvirts(places(), request.param) as manager:
        patch.setattr(adopted_worlds, "OPERATED", IN_REHEARSALS + adopted_worlds.OPERATED)
        made = Crossing(manager)
        try:
            made.prepare()
            yield made
        finally:
            manager.ended("virsh", "-q", "-c", "qemu:///system", "destroy", "web")
            for left in made.qemus():
                os.kill(left, signal.SIGKILL)
            if made.client is not None:
                made.client.close()
            made.service.clean()
            manager.ended("umount", "--all-targets", made.service.runtime / "mount/tree")


def test_it_goes_on_before_libvirtd_is_there_which_finds_it_running(world: Crossing) -> None:
    world.adopt()
    assert world.plan(do.HandoffRehearse()).note == f"web: {fast.LANE}"
    world.cross()
    done = world.resume()
    assert (done.returncode, done.stderr) == (0, "")
    (pid,) = world.qemus()
    assert world.pid() == pid
    world.begin()
    rounds, wrong = world.told("web")
    until(lambda: world.told("web")[0] > rounds + 1, "rounds before libvirtd")
    result = world.result()
    assert (result.back, result.pid, result.by, result.lane) == (True, pid, "its VMM", fast.LANE)
    assert result.blackout_ns
    world.manager.begin()
    world.goes_on("web")
    assert wrong == 0
    assert (world.qemus(), world.pid()) == ([pid], pid)
    assert world.manager.virsh("domstate", "web", "--reason").strip() == "running (booted)"
    assert world.manager.virsh("ttyconsole", "web").startswith("/dev/pts/")
    assert world.manager.virsh("list", "--all", "--with-managed-save", "--name").split() == []
    assert world.notes() == []
    world.manager.virsh("suspend", "web")
    world.manager.virsh("resume", "web")
    world.goes_on("web")
    assert not [each for each in world.snapshot().findings if each.subject == "web"]
    world.cross()  # and once more, from the words that memconsole gave it
    assert world.resume().returncode == 0
    world.begin()
    world.manager.begin()
    world.goes_on("web")
    assert world.is_whole("web")
    world.manager.virsh("destroy", "web")
    world.manager.virsh("start", "web")
    assert len(world.qemus()) == 1
    world.manager.virsh("destroy", "web")


def test_one_that_cannot_be_started_so_is_restored_by_libvirt_and_by_nobody_else(world: Crossing) -> None:
    for words in ("let-go web", "release web.pc.ram"):
        verb = () if words.startswith("release") else ("guest",)
        world.manager.run(*world.service.command(*verb, *words.split(), "--yes"))
    world.adopt()
    world.cross()
    os.chown(world.disk, 0, 0)
    world.disk.chmod(0o600)
    done = world.resume()
    assert done.returncode == 4
    assert "guest-held: web: its " in done.stderr
    assert world.qemus() == []
    assert not world.manager.ended("ls", "/run/libvirt/qemu/web.xml").stdout
    world.begin()
    world.manager.begin()
    until(lambda: world.result().back, "libvirt has restored it")
    world.goes_on("web")
    assert world.qemus() == [world.pid()]
    assert world.result().by == "libvirt"
    assert "restored by libvirt, for memconsole-resume did not start it: its " in world.result().lane
    assert world.notes() == []
