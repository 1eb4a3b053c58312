"""What is told to the service manager: sd_notify(3), with the descriptors that go along."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence


def address(environ: Mapping[str, str] = os.environ) -> str:
    """Where the service manager listens; empty where none started this process."""
    return environ.get("NOTIFY_SOCKET", "").replace("@", "\0", 1)


def send(where: str, text: str, fds: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        OSError: the service manager does not take it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(where)
        socket.send_fds(channel, [text.encode()], list(fds))
