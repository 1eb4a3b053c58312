"""What tests of the control socket share: a Source that notes who asks, and bare sockets with no manners."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Self

import msgspec

from memconsole.actions import Action
from memconsole.errors import NotFound
from memconsole.model import Event, Outcome, Part, Snapshot
from support.synthetic import NOW_NS, SyntheticSource
from support.waiting import LONG_S


class ServedSource(SyntheticSource):
    """A synthetic Source as a service wants it: ``peers`` are those who applied; a denial becomes an event.

    ``surveys`` counts Snapshots taken; ``hold``, if set, is waited for in every apply (``holding``).
    """

    def __init__(self, shown: Snapshot | None = None, *, read_only: str = "") -> None:
        super().__init__(shown, read_only=read_only)
        self.peers: list[str] = []
        self.hold: threading.Event | None = None
        self.holding = False
        self.on_snapshot: Callable[[], object] = lambda: None

    @property
    def surveys(self) -> int:
        return self.calls.count("snapshot")

    def snapshot(self, parts: Collection[Part] = ()) -> Snapshot:
        self.on_snapshot()
        return super().snapshot(parts)

    def apply(self, action: Action, *, peer: str = "") -> Outcome:
        if self.hold is not None:
            self.holding = True
            assert self.hold.wait(LONG_S)
        self.peers.append(peer)
        return super().apply(action)

    def open_readonly(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        self.peers.append(peer)
        raise NotFound(f"{region} is synthetic")

    def denied(self, peer: str, what: str) -> None:
        events = self._snapshot.events
        event = Event(events[-1].seq + 1 if events else 1, NOW_NS, "denied", what, f"{what} was denied", peer)
        self.show(msgspec.structs.replace(self._snapshot, events=(*events, event)))


class Raw:
    """A bare connection: bytes out, messages in."""

    def __init__(self, path: Path | str, timeout: float = 10.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(str(path))
        self._inbox = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    @staticmethod
    def message(method: str, /, *, more: bool = False, oneway: bool = False, **parameters: Any) -> bytes:
        """A call as it is written."""
        call = {"method": method, "parameters": parameters, "more": more, "oneway": oneway}
        return json.dumps(call).encode() + b"\0"

    def call(self, method: str, /, *, more: bool = False, oneway: bool = False, **parameters: Any) -> None:
        self.send(self.message(method, more=more, oneway=oneway, **parameters))

    def receive(self) -> dict[str, Any]:
        """The next message; EOFError if the peer closed instead."""
        while b"\0" not in self._inbox:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self._inbox += data
        message, self._inbox = self._inbox.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        return found

    def at_end(self) -> bool:
        """Whether the peer closes now, without another message."""
        try:
            self.receive()
        except (EOFError, ConnectionResetError):
            return True
        return False

    def close(self) -> None:
        self.sock.close()
