"""The fast lane of libvirt's adopted guests: the boot plan starts their QEMU, before libvirt, which finds it running.

    before the jump    the state without RAM, not locked, in custody beside the locked image (``fast:GUEST``); the words
                       of its QEMU as libvirt said them (:mod:`.own_words`), its user, groups and environment
    the next kernel    memconsole-resume compares frames, starts QEMU, and has libvirt's status file say so before it
                       goes on; not where libvirt is there already, or the domain runs
    afterwards         what its ptys are called now is written into that file; libvirt reads it when it starts

One that was not told to go on by memconsole-resume takes the other lane (:mod:`.carried_back`), from the same state;
what was, is never restored. A rehearsal takes the other lane: libvirt runs all the while, and looks for no status file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from memconsole import decoding, wholefile
from memconsole.backend import needs, steplog
from memconsole.backend.custody.names import custody_name
from memconsole.backend.guests import qemu
from memconsole.backend.handoff import own_words
from memconsole.backend.handoff.bootplan import GuestFile, MonitorLines, Start
from memconsole.backend.handoff.save_restore import SAY_MS
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt
from memconsole.backend.managers.libvirt_setup import Part
from memconsole.backend.peers.handle import GIVEN_FD
from memconsole.errors import BadFile, MemconsoleError
from memconsole.model import Guest

HELD = "fast:"
"""Before a guest's name: its state, as its QEMU takes it, in custody."""
LANE = "started before libvirt, with libvirt's own words: nothing in them is libvirt's to give"
DAEMONS = ("/run/libvirtd.pid", "/run/virtqemud.pid")
"""What each daemon that runs QEMUs of the system has from its start to its end."""
_KVM = "/dev/kvm"
_IDS = re.compile(r"^(Uid|Gid|Groups):([\t \d]*)$", re.MULTILINE)
_LARGEST = 8 << 20
_KEY = "master-key.aes"
_ANSWER_S = 10.0
_EVENTS: tuple[str, dict[str, object]] = (
    "migrate-set-capabilities",
    {"capabilities": [{"capability": "events", "state": True}]},
)
"""What libvirt sets in a QEMU when it starts it, and not when it finds it running; its saves wait for such events."""


class Showing(needs.HostTree, needs.LiveGuests, Protocol):
    """What showing libvirt the ptys of guests needs."""


class Origin(NamedTuple):
    """How a QEMU of libvirt's was started, and what libvirt had written down of it."""

    words: tuple[str, ...]
    variables: tuple[str, ...]
    uid: int
    gid: int
    groups: tuple[int, ...]
    status: bytes
    key: bytes


Planned = tuple[Start, MonitorLines, tuple[GuestFile, ...]]
"""What the boot plan has of a guest: how it is started, what its monitor is told, and what says that it runs."""


def held(guest: str) -> str:
    """What the state of a guest that takes this lane is called in custody."""
    return f"{HELD}{guest}"


def origin(root: Root, guest: Guest) -> Origin:
    """How a guest's QEMU, which runs, was started.

    Raises:
        MemconsoleError: its process, or libvirt's status file, is not shown.
    """
    name = guest.managed.name if guest.managed is not None else guest.name
    words, variables = (_texts(tree.read(root, f"/proc/{guest.pid}/{each}")) for each in ("cmdline", "environ"))
    said = dict(_IDS.findall(decoding.text(tree.read(root, f"/proc/{guest.pid}/status"))))
    ids = {key: [int(each) for each in value.split()] for key, value in said.items()}
    status = tree.read(root, f"{libvirt.STATUS}/{name}.xml", limit=_LARGEST)
    key = b""
    if (place := _noted(status).directory) and tree.exists(root, f"{place}/{_KEY}"):
        key = tree.read(root, f"{place}/{_KEY}", limit=4096)
    uids, gids = ids.get("Uid", [0]), ids.get("Gid", [0])
    return Origin(words, variables, uids[0], gids[0], tuple(ids.get("Groups", ())), status, key)


def _texts(raw: bytes) -> tuple[str, ...]:
    return tuple(decoding.text(each) for each in raw.split(b"\0")[:-1])


def _noted(status: bytes) -> own_words.Noted:
    return own_words.noted(decoding.xml(status, what="libvirt's status file", limit=_LARGEST))


def _again(found: Origin, blocks: Sequence[str]) -> own_words.Words:
    said = own_words.Words(_noted(found.status), {name: number for number, name in enumerate(blocks, GIVEN_FD)})
    said.take(found.words)
    return said


def why_not(root: Root, guest: Guest, blocks: Sequence[str], setup: Iterable[Part]) -> tuple[str, ...]:
    """What keeps a guest, which could be carried, from this lane, in words; ``setup``: what libvirt's lacks."""
    managed = guest.managed
    if managed is None or managed.user is not None:
        return ("no libvirt of the system runs it",)
    if any(part.id.startswith(("order-", "libvirt")) for part in setup):
        return ("libvirt may start before memconsole (memconsole libvirt setup)",)
    if managed.state != "running":
        return (f"it is {managed.state}",)
    try:
        found = origin(root, guest)
        said = _again(found, blocks)
    except (MemconsoleError, ValueError) as error:
        return (f"what it was started with is not shown ({error})",)
    return (*said.unsayable, *_closed(root, found, said.noted))


def _closed(root: Root, found: Origin, noted: own_words.Noted) -> list[str]:
    """What its user cannot open without libvirt."""
    why = []
    if not noted.directory:
        why.append("libvirt notes no directory of it")
    if "kvm" in found.words and not _opens(root, _KVM, found):
        why.append(f"{_KVM} is not its user's")
    why += [f"its log {path} is not its user's" for path in noted.logs.values() if not _opens(root, path, found)]
    return why


def _opens(root: Root, path: str, found: Origin) -> bool:
    """Whether the user of a QEMU may read and write a file."""
    try:
        seen = Path(tree.below(root, path)).stat()
    except OSError:
        return False
    if found.uid in {0, seen.st_uid}:
        return True
    mode = seen.st_mode >> 3 if seen.st_gid in {found.gid, *found.groups} else seen.st_mode
    return mode & 6 == 6


# --- the plan ---------------------------------------------------------------------------------------------------


def planned(guest: str, name: str, blocks: Sequence[tuple[str, str]], found: Origin) -> Planned:
    """How a guest is started again: domain ``name``, with ``blocks`` of RAM and the regions that they are.

    Raises:
        Undecodable: libvirt's status file is none.
    """
    said = _again(found, [block for block, _ in blocks])
    noted = said.noted
    given = (*(custody_name(region, 0) for _, region in blocks), held(guest))
    again = qemu.waiting_restart(said.said, noted.sockets["charmonitor"], [_EVENTS], given)
    start = Start(
        guest,
        again.words,
        noted.directory,
        f"{noted.directory}/memconsole.log",
        again.fds,
        found.uid,
        found.gid,
        found.groups,
        found.variables,
        tuple(filter(None, (noted.channels,))),
        DAEMONS,
    )
    owner = {"uid": found.uid, "gid": found.gid}
    files = [
        GuestFile(guest, f"{libvirt.STATUS}/{name}.xml", _shown(found.status)),
        GuestFile(guest, f"{libvirt.STATUS}/{name}.pid", b"@PID@", 0o644),
    ]
    if found.key:
        files.append(GuestFile(guest, f"{noted.directory}/{_KEY}", found.key, **owner, early=True))
    return start, MonitorLines(guest, again.socket, again.lines, SAY_MS), tuple(files)


def _shown(status: bytes) -> bytes:
    """Libvirt's status file of a QEMU that is yet to be started: its PID, no namespace of its own, no ptys yet."""
    from xml.etree import ElementTree

    found = decoding.xml(status, what="libvirt's status file", limit=_LARGEST)
    found.attrib |= {"pid": "@PID@", "state": "running", "reason": "booted"}
    for each in found.findall("namespaces"):
        found.remove(each)
    for device in found.iterfind("domain/devices/*"):
        if device.get("type") == "pty":
            device.attrib.pop("tty", None)
            for source in device.findall("source"):
                device.remove(source)
    return ElementTree.tostring(found)


# --- behind the jump ----------------------------------------------------------------------------------------------


def show_ptys(desk: Showing, guests: Iterable[Guest]) -> None:
    """Have libvirt, before it is there, know what the ptys of guests that were started so are called."""
    for guest in guests:
        with steplog.suppressed(f"libvirt is told the ptys of {guest.name}", MemconsoleError, OSError):
            if guest.managed is not None and not any(tree.exists(desk.root, each) for each in DAEMONS):
                _show_ptys(desk, guest, guest.managed.name)


def _show_ptys(desk: Showing, guest: Guest, name: str) -> None:
    from xml.etree import ElementTree

    from memconsole.backend.guests.qmp import Qmp

    path = f"{libvirt.STATUS}/{name}.xml"
    status = tree.read(desk.root, path, limit=_LARGEST)
    found = decoding.xml(status, what=path, limit=_LARGEST)
    asked = Qmp(guest.name, Path(tree.below(desk.root, _noted(status).sockets["charmonitor"])))
    try:
        said = asked.execute("query-chardev", within=_ANSWER_S)
    finally:
        asked.close()
    ptys = {str(each.get("label")): str(each.get("filename", "")).removeprefix("pty:") for each in said}
    for device in found.iterfind("domain/devices/*"):
        alias = device.find("alias")
        pty = ptys.get(f"char{alias.get('name', '')}", "") if alias is not None else ""
        if device.get("type") == "pty" and pty.startswith("/dev/pts/"):
            ElementTree.SubElement(device, "source", {"path": pty})
            if device.tag == "console":
                device.set("tty", pty)
    try:
        with wholefile.written(Path(tree.below(desk.root, path))) as file:
            file.write(ElementTree.tostring(found))
    except OSError as error:
        raise BadFile(f"{path} is not written", error.strerror or "", "make room in /run") from None
