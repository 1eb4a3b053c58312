"""One call on its way from a peer to its answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from memconsole import unforeseen
from memconsole.backend.wire import protocol
from memconsole.backend.wire.loop import PeerConnection

log = logging.getLogger("memconsole.wire")


@dataclass(eq=False)
class Call:
    """One call on its way to its answer; every method is called on the loop's thread."""

    connection: PeerConnection
    method: str
    more: bool
    oneway: bool
    open: bool = True

    def answer(self, parameters: bytes, fds: Sequence[int] = (), *, continues: bool = False) -> None:
        """Reply with JSON parameters, and with file descriptors, which are closed once they are sent or read."""
        if not self.open or self.oneway:
            for fd in fds:
                os.close(fd)
        else:
            tail = b',"continues":true}\0' if continues else b"}\0"
            if self.connection.inline and fds:
                self.connection.lend(fds)
                fds = ()
            self.connection.send(b'{"parameters":' + parameters + tail, fds)
        self._done(continues)

    def answer_each(self, parameters: Sequence[bytes]) -> None:
        """Reply to a call that wants more with several, of which there is at least one."""
        *first, last = parameters
        if self.open and not self.oneway and first:
            self.connection.send(b"".join(b'{"parameters":%b,"continues":true}\0' % each for each in first))
        self.answer(last)

    def fail(self, error: Exception) -> None:
        """Reply with an error; one that was not foreseen is logged, counted, and answered as ``Internal``."""
        name, fault = protocol.fault_of(unforeseen.named(error, self.method or "a call", "call"))
        self.reject(name, {member: value for member, value in msgspec.to_builtins(fault).items() if value is not None})

    def reject(self, name: str, about: dict[str, Any]) -> None:
        """Reply with an error by its whole name."""
        if self.open and not self.oneway:
            self.connection.send(msgspec.json.encode({"error": name, "parameters": about}) + b"\0")
        self._done(continues=False)

    def _done(self, continues: bool) -> None:
        if self.open and not continues:
            self.open = False
            if self.connection.busy:
                self.connection.release()
