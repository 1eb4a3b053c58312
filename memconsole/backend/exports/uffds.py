"""How the userfaultfds that agents hand over get into custody.

An agent that has handed an uffd over uses the mapping from TAKEN on, and answers DONE then. If the connection ends
before, it unmaps: HELLO lacks the grant, which is offered and handed over again. So whoever dies, a mapping that is in
use and registered has its uffd in custody. Fault points: ``map.uffd.before``, ``held`` (in custody), ``after`` (told).
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from functools import partial

from memconsole import agent as wire
from memconsole import unforeseen
from memconsole.agent import Type
from memconsole.backend import steps
from memconsole.backend.exports.agents import AgentPeer, Uffd, UffdTransfer
from memconsole.errors import MemconsoleError

log = logging.getLogger("memconsole.agents")

OnUffd = Callable[[Uffd], None]


class UffdIntake:
    """Takes uffds into custody, one after another: who hands one over waits for custody, and no other guest does."""

    def __init__(
        self, on_uffd: OnUffd | None, state: threading.Condition, disconnect: Callable[[AgentPeer], None]
    ) -> None:
        """``on_uffd`` puts one into custody; ``disconnect`` ends a peer's connection, with ``state`` held."""
        self._on_uffd = on_uffd
        self._state = state
        self._disconnect = disconnect
        self._handing: queue.SimpleQueue[UffdTransfer | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def keeps(self) -> bool:
        """Whether there is a custody to put uffds into."""
        return self._on_uffd is not None

    def take(self, handing: UffdTransfer) -> None:
        """Take one over, whose fd is closed then (-1: there is none to keep), and tell the agent; one caller a time."""
        if self._thread is None:
            self._thread = unforeseen.thread("memconsole-uffds", self._run)
            self._thread.start()
        self._handing.put(handing)

    def close(self) -> None:
        """Take over what was handed over until now, and no more."""
        if self._thread is not None:
            self._handing.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (handing := self._handing.get()) is not None:
            during = f"taking over a userfaultfd of guest {handing.peer.name}"
            failed = unforeseen.attempt(during, "agents", partial(self._keep, handing))
            if isinstance(failed, MemconsoleError):
                log.warning("guest %s is disconnected: %s", handing.peer.name, failed)
                with self._state:
                    if handing.peer.socket is handing.connection:
                        self._disconnect(handing.peer)

    def _keep(self, handing: UffdTransfer) -> None:
        steps.point("map.uffd.before")
        if handing.uffd.fd >= 0 and self._on_uffd is not None:
            try:
                self._on_uffd(handing.uffd)
            finally:
                os.close(handing.uffd.fd)
        steps.point("map.uffd.held")
        with self._state:
            if handing.peer.socket is handing.connection:
                taken = wire.pack(Type.TAKEN, handing.id)
                try:
                    handing.connection.sendmsg([taken], [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except OSError:  # it does not read, or is gone
                    self._disconnect(handing.peer)
        steps.point("map.uffd.after")
