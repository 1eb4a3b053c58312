"""What is known of a guest whose RAM is on its way into files (:mod:`.relocation`), and how such a move is ended.

    TAKING   the old QEMU has the guest; if it stands still, it goes on, and the files are forgotten
    ENDING   the state is whole, the guest stands still: the old QEMU ends if it has not, and libvirt restores

So whoever comes after a ``kill -9`` knows by the note what is true. An image is restored while its right
(:mod:`memconsole.backend.managers.plans`) is there, which libvirt's hook takes away before the guest runs, or when
somebody boots the domain meanwhile: so it runs once, and never on what is old.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from memconsole import decoding, wholefile
from memconsole.backend.guests import statestream
from memconsole.backend.guests.ramblocks import StreamBlock
from memconsole.backend.guests.statestream import Before
from memconsole.backend.kernel import census, tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt, plans, saveimage, virsh
from memconsole.backend.peers import handle
from memconsole.backend.stores import adopted, ramfiles
from memconsole.errors import Gone, GuestError, KernelRefused, MemconsoleError, NotFound
from memconsole.model import Finding, Guest, Managed, Severity
from memconsole.model.base import Value

TAKING, ENDING = "taking", "ending"
ENDS_S = 120.0
"""Seconds a QEMU has to end, and libvirt to restore its domain."""
_NOTE = "move.json"
_LARGEST = 4 << 20
_LOOK_S = 0.05


class MovedBlock(StreamBlock, frozen=True):
    """A block on its way; ``parts`` are where the guest has it: address, offset, size."""

    parts: tuple[tuple[int, int, int], ...] = ()


class Move(Value, frozen=True):
    """A move that was begun, by the control process of this runtime directory; ``guest`` as it was before."""

    runtime: str
    guest: Guest
    managed: Managed
    running: bool
    owner: tuple[int, int]
    blocks: tuple[MovedBlock, ...]
    phase: str = TAKING
    before: Before | None = None

    @property
    def uuid(self) -> str:
        """The domain's."""
        return self.managed.uuid

    def path(self, name: str) -> Path:
        """A file of it."""
        return ramfiles.directory(self.uuid) / name


def pending(runtime: Path) -> tuple[Move, ...]:
    """The moves that a control process of this runtime directory has begun, and that are at neither of their ends.

    Raises:
        Undecodable: what was written down of one is not readable. Denied, KernelRefused: it is not shown.
    """
    found = []
    for name in ramfiles.domains():
        with contextlib.suppress(NotFound):
            path = ramfiles.directory(name) / _NOTE
            raw = tree.read("/", str(path), limit=_LARGEST)
            remedy = "see docs/libvirt.md: the other files there are the guest's RAM and state"
            found.append(decoding.json(raw, Move, what=str(path), remedy=remedy, limit=_LARGEST))
    return tuple(each for each in found if each.runtime == str(runtime.absolute()))


def note(move: Move) -> None:
    """Write down how far it is.

    Raises:
        KernelRefused: it cannot be written.
    """
    path = move.path(_NOTE)
    try:
        with wholefile.written(path) as file:
            file.write(msgspec.json.encode(move))
    except OSError as error:
        raise KernelRefused(f"write {path}", error.errno or 0, remedy="make room in the host's memory") from None


def forget(move: Move) -> None:
    """Take what belongs to it away: the plan, and the names of its files."""
    plans.remove(move.uuid)
    ramfiles.forget(move.uuid)


def settle(move: Move, root: Root) -> Guest | None:
    """Bring a move that was cut short to an end: the guest on its files, or None: where it was, or ended since.

    It may be called again and again, until what it did is known and the move is forgotten (:func:`forget`).

    Raises:
        MemconsoleError: libvirt, or a QEMU, does not answer or refuses.
    """
    if move.phase == TAKING or _resumed(move):
        if move.before is not None and _lives(move):
            statestream.take_back(virsh.monitor(move.uuid), move.before)
        return None
    if _lives(move):
        end(move)
    if running(root, move.uuid) is None and plans.is_verified(move.uuid):
        restore(move)
    try:
        return here(move, root)
    except (Gone, GuestError):  # it has ended since, or was started anew by somebody
        return None


def findings(runtime: Path) -> Iterator[Finding]:
    """The guests that are on their way between two QEMUs while nothing is done about it."""
    for move in pending(runtime):
        if move.phase == ENDING:
            what = f"guest {move.guest.name} stands still: its RAM was moved, and libvirt has not started it on it yet"
            why = "its state and its RAM are in files"
        else:
            what = f"guest {move.guest.name} may stand still: moving its RAM was cut short"
            why = "its QEMU has it"
        remedy = "it is tried again every few seconds: see that libvirtd runs, and its log"
        yield Finding("guest-between", Severity.ERROR, move.guest.name, what, f"{move.path('')}: {why}", remedy)


def _resumed(move: Move) -> bool:
    """Whether the QEMU whose state was taken goes on, so that the state is an old one."""
    return _lives(move) and not stands(virsh.monitor(move.uuid))


def stands(monitor: virsh.Monitor) -> bool:
    """Whether a QEMU has sent its state and its guest has not gone on since."""
    said = decoding.convert(monitor("query-status", {}), dict[str, Any], what="QEMU's answer to query-status")
    return bool(said.get("status") == "postmigrate")


def _lives(move: Move) -> bool:
    """Whether the process that had the guest before runs."""
    with contextlib.suppress(MemconsoleError):
        state, start = handle.stat(move.guest.pid or 0)
        return start == move.guest.start_ticks and state not in {"Z", "X"}
    return False


def unlock(move: Move) -> None:
    """Put the image and the right to restore from it in place."""
    state = os.open(move.path("state"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock = saveimage.read(state).lock
        digest = lock.digest if lock is not None else ""
        elsewhere = [block.elsewhere() for block in move.blocks]
        saveimage.unlock(state, move.path("image"), elsewhere, digest=digest)
    finally:
        os.close(state)
    plans.write(move.uuid, {block.file: move.path(block.file) for block in move.blocks})
    plans.verified(move.uuid, digest)


def end(move: Move) -> None:
    """End the old QEMU, by libvirt; it has ended when this returns.

    Raises:
        GuestError: it has not.
    """
    what = f"domain {move.managed.name} cannot be ended"
    failed: GuestError | None = None
    try:
        virsh.run("destroy", move.uuid, what=what, within=ENDS_S)
    except GuestError as error:  # it may have ended by itself
        failed = error
    deadline = time.monotonic() + (ENDS_S if failed is None else 1.0)
    while _lives(move):
        if time.monotonic() > deadline:
            raise failed or GuestError(what, f"process {move.guest.pid} goes on", "see the log of libvirtd")
        time.sleep(_LOOK_S)


def restore(move: Move) -> None:
    """Have libvirt start the domain from its image, on its files.

    Raises:
        GuestError: it does not.
    """
    try:
        virsh.restore(str(move.path("image")), ENDS_S, paused=not move.running)
    except GuestError as error:
        what = f"domain {move.managed.name} is not started on the RAM that was copied; its state and RAM are kept"
        remedy = f"see why in /var/log/libvirt/qemu; it is tried again every few seconds ({error.remedy})"
        raise GuestError(what, error.why, remedy, code="NotStarted") from None


def running(root: Root, uuid: str) -> tuple[int, Managed] | None:
    """The process that runs a domain, by libvirt's word and its own command line."""
    try:
        known = libvirt.domains(root)
    except NotFound:
        return None
    for pid, managed in known.items():
        with contextlib.suppress(MemconsoleError):
            if managed.uuid == uuid and uuid in census.command(root, pid) and handle.stat(pid)[0] not in {"Z", "X"}:
                return pid, managed
    return None


def here(move: Move, root: Root) -> Guest:
    """The guest as it runs on its files, which its process maps.

    Raises:
        Gone: the domain does not run. GuestError: it runs on other RAM.
    """
    found = running(root, move.uuid)
    if found is None:
        raise Gone(f"domain {move.managed.name} does not run", "it ended", "virsh start NAME")
    pid, managed = found
    guest = replace(
        move.guest,
        pid=pid,
        start_ticks=handle.stat(pid)[1],
        command=census.command(root, pid),
        managed=managed,
        memory=sum(block.size for block in move.blocks),
    )
    wanted = set()
    for block in move.blocks:
        seen = move.path(block.file).stat()
        wanted.add((seen.st_dev, seen.st_ino))
    if not wanted <= {file.identity for file in adopted.files_of(root, guest)}:
        why = f"process {pid} does not map the files that its RAM was copied into"
        raise GuestError(
            f"domain {move.managed.name} runs on other RAM",
            why,
            "another start of it made that RAM: virsh domstate",
            code="Anew",
        )
    return guest
