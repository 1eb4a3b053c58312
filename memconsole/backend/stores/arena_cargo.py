"""What an arena carries for a handoff besides its regions, where no live update does (native/resume_cargo.c reads it).

    /.handoff.TOKEN    a file by its token, as in a session of live update; the manifest's is 1
    /.handoff.1        trusted.memconsole.handoff = "MACHINE BOOT": of who wrote it. Without that it means nothing

All of it is on the arena when :func:`leave` returns, the attribute last. memconsole-resume takes it up in another boot
of the same host, once, and takes it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from memconsole import paths
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import ext4
from memconsole.backend.stores.arena import Arena
from memconsole.backend.stores.base import Carrier, HeldRange
from memconsole.errors import KernelRefused, NotFound

PLACE = "arena:"
"""Before an arena's name: where a boot plan finds something."""
CARGO = ".handoff."
MARK = "trusted.memconsole.handoff"
MANIFEST_TOKEN = 1
_FREEZE, _THAW = 0xC0045877, 0xC0045878
_PART = 1 << 20


def leave(place: Path, files: Mapping[int, int], root: Root = "/") -> None:
    """Write files, by their tokens, into an arena that is mounted at ``place``; all, or nothing of it means anything.

    Raises:
        KernelRefused: there is no room, or it cannot be written to.
    """
    take_back(place)
    said = f"{arenas.machine_id(root)} {tree.line(root, '/proc/sys/kernel/random/boot_id')}"
    try:
        for token, fd in files.items():
            _copy(fd, place / f"{CARGO}{token}")
        paths.sync_directory(place)
        with open(place / f"{CARGO}{MANIFEST_TOKEN}", "rb") as file:  # noqa: PTH123 - for its descriptor
            os.setxattr(file.fileno(), MARK, said.encode())
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(KernelRefused):
            take_back(place)
        raise KernelRefused("write", error.errno or 0, what="an arena cannot take the guests' state") from None


def take_back(place: Path) -> None:
    """Have what was left in an arena mean nothing any more, and take it away; nothing, where nothing was left.

    Raises:
        KernelRefused: it cannot be taken away.
    """
    try:
        with contextlib.suppress(FileNotFoundError), open(place / f"{CARGO}{MANIFEST_TOKEN}", "rb") as file:  # noqa: PTH123
            _unmark(file.fileno())
        left = [each for each in place.iterdir() if each.name.startswith(CARGO)]
        for each in left:
            each.unlink()
        if left:
            paths.sync_directory(place)
    except OSError as error:
        what = "what a handoff left in an arena cannot be taken away"
        raise KernelRefused("unlink", error.errno or 0, what=what) from None


def _unmark(fd: int) -> None:
    try:
        os.removexattr(fd, MARK)
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise


def hold_still(place: Path) -> None:
    """Have all that was said be on the arena, and nothing be written there (FIFREEZE): it is clean for the next kernel.

    Raises:
        KernelRefused: it cannot be.
    """
    try:
        _ask(place, _FREEZE)
    except OSError as error:
        if error.errno != errno.EBUSY:  # it is, already
            raise KernelRefused("FIFREEZE", error.errno or 0, what="an arena cannot be held still") from None


def let_go_on(place: Path) -> None:
    """Let it be written to again; nothing, where it may be."""
    with contextlib.suppress(OSError):  # EINVAL: it is not held still
        _ask(place, _THAW)


def _ask(place: Path, request: int) -> None:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, 0)
    finally:
        os.close(fd)


def _copy(fd: int, path: Path) -> None:
    to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        at, size = 0, os.fstat(fd).st_size
        while at < size and (part := os.pread(fd, min(_PART, size - at), at)):
            at += os.write(to, part)
        os.fsync(to)
    finally:
        os.close(to)


class Carrying:
    """The part that a store takes in a handoff where its memory is arenas (:class:`.base.Store` says of what)."""

    def arenas(self) -> tuple[Arena, ...]:
        """The arenas that are this control process's to use."""
        raise NotImplementedError

    def place(self, fd: int) -> str:
        """``arena:NAME``, of the arena in which a file is; empty where it is in none of them."""
        device = os.fstat(fd).st_dev
        return next((PLACE + each.name for each in self.arenas() if each.device == device), "")

    def held_ranges(self) -> tuple[HeldRange, ...]:
        """Every arena."""
        return tuple(HeldRange(each.name, each.start, each.size) for each in self.arenas() if each.start is not None)

    def carriers(self) -> tuple[Carrier, ...]:
        """Every arena."""
        return tuple(
            Carrier(PLACE + each.name, each.name, each.free, ext4.CLUSTER, each.start) for each in self.arenas()
        )

    def leave(self, place: str, files: Mapping[int, int]) -> None:
        """Write files, by their tokens, into the arena of this place; all, or nothing of it means anything.

        Raises:
            KernelRefused: there is no room, or it cannot be written to. NotFound: there is no such arena.
        """
        for each in self.arenas():
            if PLACE + each.name == place:
                return leave(each.path, files)
        raise NotFound(f"there is no {place}", "it is not mounted any more", "memconsole arena check")

    def take_back(self) -> None:
        """Take what was left out of every arena; raises :class:`KernelRefused`."""
        for each in self.arenas():
            let_go_on(each.path)
            take_back(each.path)

    def hold_still(self, *, on: bool) -> None:
        """Hold every arena still, or none of them; raises :class:`KernelRefused`."""
        for each in self.arenas():
            if on:
                hold_still(each.path)
            else:
                let_go_on(each.path)
