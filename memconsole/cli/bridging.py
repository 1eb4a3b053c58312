"""``memconsole bridge``: its stdin and stdout are a line to the control process, for ssh and others that start it."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from functools import partial

from memconsole import unforeseen
from memconsole.backend.wire.dialing import Local
from memconsole.cli.connect import asked_socket
from memconsole.errors import ExitCode

CHUNK = 1 << 20


def bridge(options: argparse.Namespace) -> int:
    """Carry bytes both ways until the control process hangs up; descriptors do not travel.

    When stdin ends, the control process is told so, answers what it was asked, and hangs up.

    Raises:
        NoControl: none answers. Denied: this user may not open its socket.
    """
    with contextlib.closing(Local(asked_socket(options)).dial(first=True)) as line:
        line.sock.settimeout(None)
        unforeseen.thread("of what comes from stdin", partial(_from_stdin, line.sock)).start()
        while data := line.sock.recv(CHUNK):
            _write(data)
    return ExitCode.DONE


def _from_stdin(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the control process hung up, and the other side ends this one
        for data in iter(partial(os.read, sys.stdin.fileno(), CHUNK), b""):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _write(data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(sys.stdout.fileno(), left) :]
