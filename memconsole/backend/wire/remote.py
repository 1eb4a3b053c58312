"""The control process of another host: ``ssh -T HOST memconsole bridge``, and what its stdio carries.

Nothing listens and nothing is discovered: ssh, as this user's configuration has it, decides how HOST is reached and who
one is there. ``MEMCONSOLE_SSH`` names another program, with words of its own before ssh's (``-T [-o BatchMode=yes] HOST
COMMAND``). What the other side says besides, on stderr, is read as it comes, and the last of it kept, for errors.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import socket
import subprocess
import time
from dataclasses import dataclass

from memconsole import decoding
from memconsole.backend.wire.dialing import Line
from memconsole.errors import ExitCode, MemconsoleError, NoControl, UsageError, WireError

SSH = "MEMCONSOLE_SSH"
GREETS_S = 30.0
ASKS_S = 180.0
"""Seconds to the greeting where ssh may ask for a password first."""
ENDS_S = 0.3
"""Seconds that ssh has to end by itself once the line is closed."""
_SAID = 4096
_BUFFER = 1 << 20


def checked(host: str) -> str:
    """A host as ssh takes it: ``HOST``, ``USER@HOST``, ``ssh://USER@HOST:PORT``, or a name of ssh_config.

    Raises:
        UsageError: it is none; a word that begins with ``-`` would be an option.
    """
    name = host.rpartition("@")[2].removeprefix("ssh://")
    if not name or host.startswith("-") or name.startswith("-") or not host.isprintable() or re.search(r"\s", host):
        raise UsageError(
            f"{host!r} is not a host", "a host is a name or address as ssh takes it", "write HOST or USER@HOST"
        )
    return host


def program() -> list[str]:
    """The program that reaches hosts, and its own words."""
    return shlex.split(os.environ.get(SSH, "")) or ["ssh"]


@dataclass(frozen=True)
class Remote:
    """The control process of ``host``, at ``socket`` there (its usual one if empty).

    Only where ``asks`` may ssh ask for a password or a host's key, and only for the first line.
    """

    host: str
    socket: str = ""
    asks: bool = False
    descriptors = False

    @property
    def label(self) -> str:
        """The host, as it was named."""
        return self.host

    def dial(self, *, first: bool) -> Line:
        """See :class:`Place`."""
        asks = self.asks and first
        there = shlex.join(["memconsole", *(["--socket", self.socket] if self.socket else []), "bridge"])
        words = [*program(), "-T", *([] if asks else ["-o", "BatchMode=yes"]), checked(self.host), there]
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
            try:
                process = subprocess.Popen(
                    words,
                    bufsize=0,
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    stderr=subprocess.PIPE,
                    start_new_session=not asks,
                )
            except OSError as error:
                ours.close()
                raise NoControl(
                    f"{words[0]} cannot be run",
                    error.strerror or str(error),
                    f"install ssh (openssh-client), or name another program in {SSH}",
                    code="NoSsh",
                ) from None
        return RemoteLine(ours, self.host, process, ASKS_S if asks else GREETS_S)


class RemoteLine(Line):
    """A program whose stdin and stdout are the other end of ``sock``."""

    def __init__(self, sock: socket.socket, host: str, process: subprocess.Popen[bytes], greets_within: float) -> None:
        super().__init__(sock, host)
        self.greets_within = greets_within
        self._host = host
        self._process = process
        self._greeted = False
        self._said = b""
        assert process.stderr is not None  # noqa: S101 - it was asked for
        self._stderr = process.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._talks = True

    def wait(self, deadline: float | None) -> None:
        """See :class:`Line`; what is said on stderr meanwhile is taken, so that the program can go on."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if self._talks:
            poll.register(self._stderr, select.POLLIN)
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = dict(poll.poll(None if left is None else left * 1000 + 1))
            if not ready and left is not None:
                raise TimeoutError
            if self._stderr.fileno() in ready and not self._hear():
                poll.unregister(self._stderr)
            if self.sock.fileno() in ready:
                self.sock.settimeout(1.0)
                return

    def _hear(self) -> bool:
        """Take what was said; false, once there will be no more."""
        try:
            said = os.read(self._stderr.fileno(), 65536)
        except BlockingIOError:
            return True
        self._said = (self._said + said)[-_SAID:]
        self._talks = bool(said)
        return self._talks

    def greeted(self) -> None:
        """See :class:`Line`; what ssh said on the way is no reason for what fails later."""
        self._greeted = True
        self._said = b""

    def gone(self, method: str, *, acting: bool) -> MemconsoleError:
        """See :class:`Line`: what ssh, the shell there, or memconsole there says of it."""
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(2.0)
        while self._talks and self._said_more():
            pass
        lines = [line.strip() for line in decoding.text(self._said).splitlines() if line.strip()]
        if not self._greeted:
            return unreached(self._host, code, lines)
        return NoControl(
            f"the connection to {self._host} was lost during {method}",
            lines[-1] if lines else "the control process there ended, or the way to it did",
            "connect again; the action is then wholly done or wholly not, check the events there before you repeat it"
            if acting
            else f"see whether {self._host} is up: {_shown(self._host)}",
            code="ControlDied",
        )

    def _said_more(self) -> bool:
        poll = select.poll()
        poll.register(self._stderr, select.POLLIN)
        return bool(poll.poll(0)) and self._hear()

    def silent(self, method: str, seconds: float) -> MemconsoleError:
        """See :class:`Line`."""
        said = decoding.text(self._said).strip().splitlines()
        return NoControl(
            f"the control process on {self._host} does not answer {method}",
            f"nothing came within {seconds:g} s" + (f"; {said[-1]}" if said and not self._greeted else ""),
            f"see whether {self._host} is up, and the log of its service: {_shown(self._host)}",
            code="NoAnswer",
        )

    def close(self) -> None:
        """See :class:`Line`; the program ends with it."""
        self.sock.close()
        self._stderr.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_S if end is None else 2.0)
                return


def _shown(host: str) -> str:
    """How a person looks there."""
    return shlex.join([*program(), host])


@dataclass(frozen=True)
class _Reason:
    """What ssh says, by a pattern of its words: the code it gets here, and what to do about it."""

    pattern: str
    code: str
    what: str
    remedy: str


_REASONS = (
    _Reason(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "HostKeyChanged",
        "{host} has another host key than it had",
        "find out why before you connect: it was set up anew, or another machine answers; ssh-keygen -R forgets a key",
    ),
    _Reason(
        r"Host key verification failed|No .* host key is known",
        "HostKeyUnknown",
        "the host key of {host} is not known",
        "ask who runs {host} for its key, then connect once by hand and compare: {ssh}",
    ),
    _Reason(
        r"Permission denied|Too many authentication failures|No supported authentication methods",
        "SshDenied",
        "{host} does not let this user in",
        "name the user (USER@HOST), load a key (ssh-add), or share a connection that stands (ControlMaster)",
    ),
    _Reason(
        r"Could not resolve hostname|Name or service not known",
        "HostUnknown",
        "{host} is not known",
        "check the name, and ~/.ssh/config",
    ),
    _Reason(
        r"Connection refused|timed out|No route to host|Network is unreachable|Connection closed|Connection reset",
        "HostUnreachable",
        "{host} cannot be reached",
        "see whether it is up and its sshd runs: {ssh}",
    ),
)  # fmt: skip


def unreached(host: str, code: int | None, lines: list[str]) -> MemconsoleError:
    """The error for a line that ended before a greeting: by the exit status, and by what was said last."""
    said = "\n".join(lines)
    last = next((line for line in reversed(lines) if not line.startswith("remedy:")), "")
    ssh = _shown(host)
    if code == ExitCode.USAGE and "bridge" in said:
        return older(host, "", last)
    if code == ExitCode.NO_CONTROL:
        why = last.removeprefix("memconsole: ")
        remedy = f"start it there: {ssh} memconsole serve (as a service: systemctl start memconsole)"
        return NoControl(f"no control process answers on {host}", why, remedy, code="NoSocket")
    if code in {126, 127}:
        return NoControl(
            f"{host} has no memconsole that can be run",
            last or f"its shell ended with {code}",
            f"install it there, where a shell without a terminal finds it: {ssh} memconsole --version",
            code="NotInstalled",
        )
    for reason in _REASONS if code in {None, 255} else ():
        if found := next((line for line in lines if re.search(reason.pattern, line)), ""):
            what, remedy = (text.format(host=host, ssh=ssh) for text in (reason.what, reason.remedy))
            return NoControl(what, found.strip("@ "), remedy, code=reason.code)
    ended = "it did not end" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with {code}"
    return NoControl(
        f"{host} cannot be reached", last or f"{program()[0]} {ended}", f"try it by hand: {ssh}", code="SshFailed"
    )


def older(host: str, version: str, said: str = "") -> WireError:
    """The error for a memconsole that knows nothing of bridges."""
    from memconsole import __version__

    there = f"memconsole {version}" if version else "its memconsole"
    return WireError(
        f"{host} is too old to be reached from here: {there} knows no bridge, this one is {__version__}",
        said,
        f"upgrade the one on {host}, then restart its service",
        code="ProtocolVersion",
    )


def babble(host: str, error: WireError) -> WireError:
    """The error for a host of which something else came than a greeting."""
    return WireError(
        f"what came from {host} is not memconsole's",
        error.why,
        f"see what its shell writes before a command runs: {shlex.join([*program(), host])} true",
        code="NotVarlink",
    )
