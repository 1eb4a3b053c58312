"""A domain's RAM that only its QEMU can hold is moved into files, and libvirt starts the domain on them.

    /run/memconsole/ram/UUID/           until it runs there (:mod:`memconsole.backend.stores.ramfiles`)
        BLOCK                           a block of RAM
        move.json                       what was begun and how far it is, for the control process that comes after this
        state                           the state of its devices and vCPUs, locked to these files
        image                           the same, unlocked, while libvirt restores from it

It is a live migration into the files (:mod:`.statestream`), the end of the old QEMU, and a restore of what is left, for
which libvirt's hook puts the files in the place of new RAM. The guest stands still from the last round of the migration
to the end of the restore. Who comes after a ``kill -9`` finds the note (:mod:`.moves`).
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from memconsole import decoding
from memconsole.backend.guests import moves, ramblocks, statestream
from memconsole.backend.guests.moves import Move, MovedBlock
from memconsole.backend.guests.statestream import StateStream
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import domainxml, plans, saveimage, virsh
from memconsole.backend.managers.guest_memory import Block
from memconsole.backend.steps import Step
from memconsole.backend.stores import ramfiles
from memconsole.errors import GuestError
from memconsole.model import Guest


class Relocation:
    """One move, from the first question to its end; each method is a step, ``back_...`` what undoes it."""

    def __init__(self, root: Root, runtime: Path, guest: Guest, shown: Guest) -> None:
        if shown.managed is None:
            raise GuestError(f"guest {shown.name} is not moved", "no manager starts it again", "start it by hand")
        self._root, self._runtime, self._guest, self._managed = root, runtime, guest, shown.managed
        self._monitor = virsh.monitor(shown.managed.uuid)
        self._xml = b""
        self._stream: StateStream | None = None
        self._files: list[int] = []
        self._move: Move | None = None
        self._stood_at = 0.0
        self._pieces: dict[str, float] = {}

    @property
    def move(self) -> Move:
        """What was begun, once QEMU was asked."""
        if self._move is None:
            raise GuestError(f"guest {self._guest.name} is not moved", "its steps have not begun", "run them in order")
        return self._move

    @property
    def _taking(self) -> StateStream:
        if self._stream is None:
            raise GuestError(f"guest {self._guest.name} is not moved", "its steps have not begun", "run them in order")
        return self._stream

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors of the blocks' files, in their order, which stay this value's."""
        return tuple(self._files[: len(self.move.blocks)])

    def close(self) -> None:
        """Close what is open; nothing else of it changes."""
        while self._files:
            os.close(self._files.pop())

    def ask(self, blocks: tuple[Block, ...]) -> None:
        """See what has to be moved, and whether it can be.

        Raises:
            GuestError, Refused, Undecodable: it cannot, or libvirt or QEMU does not say.
        """
        self._xml = virsh.description(self._managed.uuid)
        domainxml.on_files(self._xml, moved=True)
        names = ramblocks.stream_names(self._monitor)
        self._move = Move(
            str(self._runtime.absolute()),
            self._guest,
            self._managed,
            statestream.look(self._monitor, self._guest.name).running,
            _owner(self._root, self._guest.pid or 0),
            tuple(_block(self._guest.name, block, names) for block in blocks if not block.nv),
        )

    def make(self) -> None:
        """Make the files, and write down what is begun.

        Raises:
            Refused, KernelRefused: there is no room, or no tmpfs can be mounted.
        """
        ramfiles.make(self.move.uuid)
        try:
            moves.note(self.move)
            for block in self.move.blocks:
                self._files.append(ramfiles.create(self.move.path(block.file), block.size, self.move.owner))
            self._files.append(ramfiles.create(self.move.path("state"), 0, (0, 0)))
        except BaseException:
            self.back_make()
            raise

    def back_make(self) -> None:
        """Forget the files, unless they are all that is left of the guest."""
        if self._move is not None and self.move.phase == moves.TAKING:
            self.close()
            moves.forget(self.move)

    def look(self) -> None:
        """Begin the image, and see what its QEMU is set to."""
        elsewhere = [block.elsewhere(fd) for block, fd in zip(self.move.blocks, self.fds, strict=True)]
        to = domainxml.Lock(self.move.blocks[0].region, secrets.token_hex(32))
        xml = domainxml.locked(domainxml.on_files(self._xml, moved=True), to)
        saveimage.begin(self._files[-1], saveimage.Image(self.move.running, xml))
        pid = self._guest.pid or 0
        self._stream = StateStream(self._guest.name, pid, self._monitor, self._files[-1], elsewhere)
        self._part("look").do()
        self._note(before=self._stream.before)

    def set(self) -> None:
        """Have QEMU send its state as fast as it can."""
        self._part("set").do()

    def back_set(self) -> None:
        """Set it as it was."""
        self._undo("set")

    def copy(self) -> None:
        """Move the RAM while the guest runs; at the end it stands still, and its state is whole.

        Raises:
            GuestError: QEMU refused, or the domain was changed meanwhile. Refused, KernelRefused: see the stream.
        """
        began = time.monotonic()
        self._part("stream").do()
        now, taken = time.monotonic(), self._taking.taken
        last = taken.downtime_ms / 1000 if taken is not None else 0.0
        self._pieces |= {"copied": now - began, "last round": last}
        self._stood_at = now - last
        try:
            self._refuse_changed()
            saveimage.finish(self._files[-1])
        except BaseException:
            self._undo("stream")
            raise

    def _refuse_changed(self) -> None:
        if domainxml.lasting(virsh.description(self._managed.uuid)) != domainxml.lasting(self._xml):
            why = "its XML is another than before its RAM was copied"
            raise GuestError(f"domain {self._managed.name} was changed meanwhile", why, "try again", code="Changed")

    def back_copy(self) -> None:
        """Let the guest go on where it was."""
        self._undo("stream")

    def _part(self, id: str) -> Step:
        return next(step for step in self._taking.steps() if step.id == id)

    def _undo(self, id: str) -> None:
        undo = self._part(id).undo
        if self.move.phase == moves.TAKING and undo is not None:
            undo()

    def end(self) -> None:
        """End the QEMU that stands still, with the right to restore in place.

        Raises:
            GuestError: it goes on, or does not end: then the right is gone.
        """
        self._refuse_resumed()
        began = time.monotonic()
        moves.unlock(self.move)
        self._note(phase=moves.ENDING)
        try:
            moves.end(self.move)
        except BaseException:
            plans.remove(self.move.uuid)
            self._note(phase=moves.TAKING)
            raise
        self._pieces["ended"] = time.monotonic() - began

    def _refuse_resumed(self) -> None:
        if not moves.stands(self._monitor):
            why = "it was resumed since its RAM was copied"
            raise GuestError(f"domain {self._managed.name} was changed meanwhile", why, "try again", code="Changed")

    def start(self) -> Guest:
        """Have libvirt start the domain on the files; the guest as it is then.

        Raises:
            GuestError: it does not start; its state and its RAM are kept.
        """
        began = time.monotonic()
        moves.restore(self.move)
        now = time.monotonic()
        self._pieces["started"] = now - began
        self._pieces["stood"] = now - self._stood_at
        return moves.here(self.move, self._root)

    def back_end(self) -> None:
        """Start the domain, if it does not run: its old QEMU is no more."""
        if self.move.phase == moves.ENDING and moves.running(self._root, self.move.uuid) is None:
            moves.restore(self.move)

    @property
    def is_kept(self) -> bool:
        """Whether the files may be all that is left of the guest; :func:`settle` ends what is not done."""
        return self._move is not None and self.move.phase == moves.ENDING

    def done(self) -> None:
        """It runs where it should, and the ledger knows: take the names away."""
        moves.forget(self.move)
        self.close()

    def told(self) -> str:
        """How long the guest stood still, and what for."""
        at = self._pieces
        if not self.move.running:
            return f"it was paused; its RAM was copied in {at['copied']:.1f} s"
        parts = ", ".join(f"{name} {at[name]:.2f}" for name in ("last round", "ended", "started"))
        return f"it stood still for {at['stood']:.2f} s ({parts}), its RAM was copied in {at['copied']:.1f} s"

    def _note(self, **changes: Any) -> None:
        self._move = replace(self.move, **changes)
        moves.note(self.move)


def _block(guest: str, block: Block, names: frozenset[str]) -> MovedBlock:
    parts = tuple((part.gpa, part.offset, part.size) for part in block.parts)
    stream = ramblocks.stream_name(guest, block.name, names)
    return MovedBlock(block.name, ramblocks.region_name(guest, block.name), block.size, stream, parts)


def _owner(root: Root, pid: int) -> tuple[int, int]:
    """The user and the group that a process opens files as."""
    rows = tree.text(tree.read(root, f"/proc/{pid}/status")).splitlines()
    found = {name: rest.split() for name, _, rest in (row.partition(":") for row in rows)}
    with decoding.named(f"/proc/{pid}/status", ""):
        return int(found["Uid"][3]), int(found["Gid"][3])
