"""Hosts in trees on which libvirt's daemons, the system's and users', run domains: status files and processes."""

from __future__ import annotations

import re
from pathlib import Path

from support.trees import FakeProcess, Tree, maps_line

STATUS = (Path(__file__).parent.parent / "support" / "domstatus.xml").read_bytes()
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
ALICE, MALLORY = 1000, 1666
MAPS = maps_line(0x7F0000000000, 0x7F0004000000, "rw-s", path="/memfd:memory-backend-memfd (deleted)", inode=9)


def status(pid: int, *, uuid: str = UUID, name: str = "web shop") -> bytes:
    named = STATUS.replace(b"<name>web shop<", f"<name>{name}<".encode()).replace(UUID.encode(), uuid.encode())
    return re.sub(rb"pid='17711'", f"pid='{pid}'".encode(), named, count=1)


def place(uid: int, name: str = "web shop.xml") -> str:
    return f"/run/user/{uid}/libvirt/qemu/run/{name}"


def qemu(tree: Tree, pid: int, uid: int, uuid: str = UUID) -> None:
    words = ("qemu-system-x86_64", "-name", "guest=web shop", "-uuid", uuid)
    tree.process(FakeProcess(pid, "qemu-system-x86", uid=uid, command=words, maps=MAPS))


def host(tmp_path: Path) -> Tree:
    """A host on which Alice's session daemon runs a domain."""
    tree = Tree(tmp_path)
    tree.host()
    tree.meminfo()
    qemu(tree, 500, ALICE)
    tree.write(place(ALICE), status(500))
    return tree
