r"""QEMU's guest agent, over the socket of its channel: the time of the guest, asked and set.

    request  = [ %xff ] JSON "\n"           %xff has the agent forget what it read of a line before
    reply    = [ %xff ] JSON "\n"           %xff stands before the answer to guest-sync-delimited alone

What answers is a process of the guest, so it may say anything, or nothing: each reply is bounded in size and time, must
be what was asked for, and its words are shown escaped. The channel has one client at a time; another one waits in vain.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from memconsole import decoding
from memconsole.errors import GuestError

T = TypeVar("T")
_REPLY = 64 << 10
_WORDS = 160
_DELIMITER = b"\xff"
_NS_MAX = 1 << 62
"""The last time that can be a guest's: it fits into what its kernel counts in."""


class _Error(msgspec.Struct):
    desc: str = ""


class _AgentReply(msgspec.Struct):
    result: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw, name="return")
    error: _Error | None = None


class Channel:
    """A connection to one guest's agent, for all of ``within`` seconds at most.

    Raises:
        GuestError: it cannot be connected to, or the agent does not answer.
    """

    def __init__(self, guest: str, path: Path, within: float) -> None:
        self._guest = guest
        self._deadline = time.monotonic() + within
        self._within = within
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(self._left())
            self._socket.connect(os.fspath(path))
            self._sync()
        except OSError as error:
            self._socket.close()
            raise self._silent(error.strerror or str(error)) from None
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the channel to the next client."""
        self._socket.close()

    def time(self) -> int:
        """The guest's wall clock, ns since the epoch.

        Raises:
            GuestError: the agent refused, or did not answer, or its answer is no time.
        """
        found: int = self._ask("guest-get-time", int)
        if not 0 <= found < _NS_MAX:
            raise GuestError(
                f"the agent of guest {self._guest} reports no time",
                "its answer is not a number",
                "see its log in the guest",
            )
        return found

    def set_time(self, now_ns: int) -> None:
        """Have the guest set its wall clock, and with it its clock in hardware.

        Raises:
            GuestError: the agent refused, or did not answer.
        """
        self._ask("guest-set-time", Any, {"time": now_ns})

    def _sync(self) -> None:
        """Read away what was meant for somebody before."""
        id = int.from_bytes(os.urandom(4), "little")
        self._send("guest-sync-delimited", {"id": id}, _DELIMITER)
        while True:
            line = self._line()
            _, mark, answer = line.rpartition(_DELIMITER)
            if mark and self._reply(answer, "guest-sync-delimited", int) == id:
                return

    def _ask(self, command: str, kind: Any, arguments: dict[str, object] | None = None) -> Any:
        try:
            self._send(command, arguments)
            return self._reply(self._line(), command, kind)
        except OSError as error:
            raise self._silent(f"{command}: {error.strerror or error}") from None

    def _send(self, command: str, arguments: dict[str, object] | None, before: bytes = b"") -> None:
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.settimeout(self._left())
        self._socket.sendall(before + msgspec.json.encode(request) + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._rest:
            self._socket.settimeout(self._left())
            more = self._socket.recv(4096)
            if not more:
                raise self._silent("its channel was closed")
            self._rest += more
            if len(self._rest) > _REPLY:
                raise self._silent(f"it says more than {_REPLY} bytes")
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _reply(self, line: bytes, command: str, kind: Any) -> Any:
        what = f"the answer of guest {self._guest} to {command}"
        try:
            reply = decoding.json(line, _AgentReply, what=what, limit=_REPLY)
            if reply.error is None and bytes(reply.result):
                return decoding.json(reply.result, kind, what=what, limit=_REPLY)
        except decoding.Undecodable as error:
            raise GuestError(error.what, shown(error.why)) from None
        said = shown(reply.error.desc) if reply.error is not None else "it says neither yes nor no"
        raise GuestError(f"the agent of guest {self._guest} refused {command}", said, "see its log in the guest")

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._silent(f"no answer within {self._within:g} s")
        return left

    def _silent(self, why: str) -> GuestError:
        why = f"no answer within {self._within:g} s" if why == "timed out" else why
        return GuestError(
            f"the agent of guest {self._guest} does not answer", why, "see whether qemu-ga runs in the guest"
        )


def shown(words: str) -> str:
    """Words of a guest as they can be shown: printable, and not many."""
    safe = "".join(char if char.isprintable() else "?" for char in words[: _WORDS + 1])
    return f"{safe[:_WORDS]}..." if len(safe) > _WORDS else safe
