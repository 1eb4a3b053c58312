"""The monitor of a QEMU that somebody else started: libvirt's through libvirt, another's by its QMP socket.

A QMP socket serves one client at a time: it is let go of as soon as the answer is there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.kernel import tree
from memconsole.backend.managers import guest_memory, virsh
from memconsole.backend.managers.guest_memory import Block
from memconsole.errors import NotFound
from memconsole.model import Guest

WITHIN_S = 10.0
"""Seconds a QMP socket has to answer a command."""
_CREDENTIALS = struct.Struct("=iII")
_CONNECT_S = 2.0


def blocks(guest: Guest, qmp: str = "") -> tuple[Block, ...]:
    """What a VM's QEMU says of its RAM blocks.

    Raises:
        GuestError: it does not answer, or is migrating. Undecodable: it answers in a way that is not known here.
    """
    if guest.managed is not None:
        return guest_memory.blocks(virsh.monitor(guest.managed.uuid))
    with contextlib.closing(Qmp(guest.name, Path(qmp))) as monitor:

        def ask(command: str, arguments: Mapping[str, object]) -> Any:
            return monitor.execute(command, arguments, within=WITHIN_S)

        return guest_memory.blocks(ask)


def process(qmp: str) -> int:
    """The PID of who listens at a QMP socket (SO_PEERCRED).

    Raises:
        NotFound: nobody does, or it is in another PID namespace. Denied, KernelRefused: it cannot be told.
    """
    if not os.path.isabs(qmp):  # noqa: PTH117 - it is no path of this process yet
        raise NotFound(f"there is no QMP socket {qmp}", "its path does not begin with /", "write the whole path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as asked:
        asked.settimeout(_CONNECT_S)
        try:
            asked.connect(qmp)
            raw = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except ConnectionRefusedError:
            raise NotFound(
                f"no process listens at {qmp}", "its QEMU ended", "name the socket of one that runs"
            ) from None
        except OSError as error:
            raise tree.failure(qmp, error) from error
    pid = int(_CREDENTIALS.unpack(raw)[0])
    if pid <= 0:
        raise NotFound(
            f"the process that listens at {qmp} is not shown", "it is in another PID namespace", "adopt it from there"
        )
    return pid
