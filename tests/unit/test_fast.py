"""The fast lane of adopted guests: what the boot plan has of each, and what keeps one from it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace
from support.trees import Tree

from memconsole.backend.handoff import bootplan, fast
from memconsole.backend.handoff.bootplan import BootPlan
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.managers.sealed import Standing
from memconsole.model import Guest, GuestKind, GuestState, Managed

DIRECTORY = "/var/lib/libvirt/qemu/domain-1-web"
RAM = {"qom-type": "memory-backend-memfd", "id": "pc.ram", "share": True, "size": 4096}
WORDS = (
    *("/usr/bin/qemu", "-S", "-machine", "q35,memory-backend=pc.ram", "-object", json.dumps(RAM)),
    *("-chardev", "socket,id=charmonitor,fd=27,server=on,wait=off", "-chardev", "pty,id=charserial0"),
)
STATUS = f"""<domstatus state='paused' reason='user' pid='17'>
  <monitor path='{DIRECTORY}/monitor.sock' type='unix'/>
  <namespaces><mount/></namespaces>
  <libDir path='{DIRECTORY}'/>
  <channelTargetDir path='/run/channels'/>
  <domain type='qemu' id='1'><devices>
    <serial type='pty'><source path='/dev/pts/4'/><alias name='serial0'/></serial>
    <console type='pty' tty='/dev/pts/4'><source path='/dev/pts/4'/><alias name='serial0'/></console>
  </devices></domain>
</domstatus>"""
GUEST = Guest("web", GuestKind.FOREIGN, GuestState.RUNNING, 17, 8, memory=4096)
MANAGED = Managed("libvirt", "web shop", "5d5b5d26", state="running")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.write("/proc/17/cmdline", "".join(f"{word}\0" for word in WORDS))
    made.write("/proc/17/environ", "LC_ALL=C\0HOME=/x\0")
    made.write(
        "/proc/17/status", "Name:\tqemu\nUid:\t64055\t64055\t64055\t64055\nGid:\t64\t64\t64\t64\nGroups:\t106 64 \n"
    )
    made.write("/run/libvirt/qemu/web shop.xml", STATUS)
    made.write(f"{DIRECTORY}/master-key.aes", "key")
    return made


def why_not(tree: Tree, *lacks: Part, **changed: object) -> tuple[str, ...]:
    managed = replace(MANAGED, **changed)
    return fast.why_not(tree.root, replace(GUEST, managed=managed), ["pc.ram"], lacks)


def test_the_plan_has_a_qemu_as_libvirt_made_it_and_what_tells_libvirt_of_it(tree: Tree) -> None:
    assert why_not(tree) == ()
    found = fast.origin(tree.root, replace(GUEST, managed=MANAGED))
    start, say, files = fast.planned("web", "web shop", [("pc.ram", "web.pc.ram")], found)
    assert (start.uid, start.gid, start.groups, start.variables) == (64055, 64, (106, 64), ("LC_ALL=C", "HOME=/x"))
    assert (start.directory, start.directories, start.unless) == (DIRECTORY, ("/run/channels",), fast.DAEMONS)
    assert start.fds == (("region:web.pc.ram:0", 3), ("fast:web", 4))
    assert start.words[-2:] == ("-incoming", "defer")
    assert (say.guest, say.socket) == ("web", f"{DIRECTORY}/monitor.sock")
    said = [json.loads(line)["execute"] for line, _ in say.lines]
    assert said == ["qmp_capabilities", "migrate-set-capabilities", "migrate-incoming", "query-status", "cont"]
    assert [(each.path, each.mode, each.early) for each in files] == [
        ("/run/libvirt/qemu/web shop.xml", 0o600, False),
        ("/run/libvirt/qemu/web shop.pid", 0o644, False),
        (f"{DIRECTORY}/master-key.aes", 0o600, True),
    ]
    assert (files[1].content, files[2].content, files[2].uid) == (b"@PID@", b"key", 64055)
    status = ElementTree.fromstring(files[0].content)
    assert status.attrib == {"state": "running", "reason": "booted", "pid": "@PID@"}
    assert status.find("namespaces") is None  # else libvirt would make and take away nodes in the host's own /dev
    assert b"/dev/pts" not in files[0].content
    assert bootplan.decode(bootplan.encode(BootPlan((), (), (start,), (say,), files=files))).files == files


def test_what_keeps_a_guest_from_it_is_said(tree: Tree) -> None:
    order = Part("order-libvirtd", "libvirtd after memconsole", "/etc", Standing.MISSING)
    assert why_not(tree, order) == ("libvirt may start before memconsole (memconsole libvirt setup)",)
    assert why_not(tree, state="paused") == ("it is paused",)
    assert why_not(tree, user=1000) == ("no libvirt of the system runs it",)
    tree.write("/proc/17/cmdline", "".join(f"{word}\0" for word in (*WORDS, "-accel", "kvm", "-spice", "port=1")))
    assert why_not(tree) == ("option -spice", "/dev/kvm is not its user's")
    tree.write("/run/libvirt/qemu/web shop.xml", "<nonsense")
    (said,) = why_not(tree)
    assert said.startswith("what it was started with is not shown")
