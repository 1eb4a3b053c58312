"""A keeper that is replaced when it ends: custody that outlives either of two processes, and ends only with both.

The control process has copies of what the keeper holds. When the keeper is gone, another one is started and gets them;
what only the keeper had is lost, and said.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from memconsole.backend.custody.holder import ANSWERS, KeeperCustody
from memconsole.backend.peers.turns import Turn
from memconsole.errors import Gone, MemconsoleError, NotFound, Silent

log = logging.getLogger("memconsole.custody")


class RespawningKeeper:
    """Fds held by the keeper of a runtime directory, or by the one after it; see :class:`~.custody.Custody`.

    Raises:
        KernelRefused, MemconsoleError: no keeper could be started.
    """

    survives = True
    resumes = True

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._turn = Turn("custody")
        self._keeper = KeeperCustody.start(runtime_dir)
        self._copies: dict[str, tuple[int, bytes]] = {}
        self._known: set[str] = set()
        self._troubles: list[str] = []
        self._lost: list[str] = []
        for name in self.names():
            with contextlib.suppress(NotFound):
                os.close(self.get(name)[0])

    @property
    def label(self) -> str:
        """See :class:`~.custody.Custody`."""
        return self._keeper.label

    @property
    def pid(self) -> int:
        """The keeper's."""
        return self._keeper.pid

    @property
    def lost(self) -> tuple[str, ...]:
        """See :class:`~.custody.Custody`: what only a keeper had that is no more."""
        return tuple(self._lost)

    def troubles(self) -> list[str]:
        """See :class:`~.custody.Custody`."""
        return list(self._troubles)

    def unguarded(self) -> list[str]:
        """See :class:`~.custody.Custody`."""
        return self._keeper.unguarded()

    def bind(self, pid: int) -> None:
        """See :class:`~.custody.Custody`; the keeper outlives this process."""

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken(f"put {name}", ANSWERS):
            self._present()
            self._keeper.put(name, fd, payload)
            self._copy(name, fd, payload)

    def get(self, name: str) -> tuple[int, bytes]:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken(f"get {name}", ANSWERS):
            self._present()
            fd, payload = self._keeper.get(name)
            self._copy(name, fd, payload)
            return fd, payload

    def drop(self, name: str) -> None:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken(f"drop {name}", ANSWERS):
            self._present()
            self._known.discard(name)
            if name in self._copies:
                os.close(self._copies.pop(name)[0])
            self._keeper.drop(name)

    def names(self) -> list[str]:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken("its names", ANSWERS):
            self._present()
            names = self._keeper.names()
            for gone in self._copies.keys() - set(names):
                os.close(self._copies.pop(gone)[0])
            self._known = set(names)
            return names

    def jump(self) -> None:
        """See :class:`~.custody.Custody`; the keeper makes the jump: nothing it holds vanishes before."""
        with self._turn.taken("the jump", ANSWERS):
            self._present()
            self._keeper.jump()

    def check(self) -> None:
        """See :class:`~.custody.Custody`."""
        with self._turn.taken("a sign of life", ANSWERS):
            self._present()

    def close(self) -> None:
        """Close the copies and the connection; the keeper goes on."""
        with contextlib.suppress(Silent), self._turn.taken("its end", ANSWERS):
            for fd, _ in self._copies.values():
                os.close(fd)
            self._copies = {}
            self._keeper.close()

    def _copy(self, name: str, fd: int, payload: bytes) -> None:
        old = self._copies.get(name)
        self._copies[name] = os.dup(fd), payload
        self._known.add(name)
        if old is not None:
            os.close(old[0])

    def _present(self) -> None:
        """See that the keeper is there, or that another one is, with everything this process has a copy of.

        Raises:
            Gone: there is none, and none can be started.
        """
        try:
            self._keeper.check()
        except Gone as gone:
            self._replace(gone)

    def _replace(self, gone: Gone) -> None:
        ended = self._keeper
        try:
            keeper = KeeperCustody.start(self._runtime_dir)
            if keeper.pid != ended.pid:
                for name, (fd, payload) in self._copies.items():
                    keeper.put(name, fd, payload)
        except MemconsoleError as error:
            gone.why = f"{gone.why}; no other keeper could be started: {error}"
            raise gone from None
        ended.close()
        self._keeper = keeper
        if keeper.pid != ended.pid:
            lost = sorted(self._known - self._copies.keys())
            self._known -= set(lost)
            self._lost += lost
            said = f"the {ended.label}, ended; keeper {keeper.pid} holds {len(self._copies)} descriptors again"
            self._troubles.append(f"{said}, and {', '.join(lost)} are lost" if lost else said)
            log.error("%s", self._troubles[-1])
