"""What custody knows of the mount: whose its files are, and what each of them shows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from memconsole import newer
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import MOUNT
from memconsole.errors import BadFile
from memconsole.model import Value

if TYPE_CHECKING:
    from memconsole.backend.custody.holder import Custody

UNREAD = "mount-unread"
"""What a table that this memconsole cannot read is called in custody; nothing here reads it, so it is told of."""


class ShownFile(Value, frozen=True):
    """A file of the mount that showed a memfd, both by device and inode; ``closed``: it was open nowhere at its end."""

    path: str
    region: str
    memfd: tuple[int, int]
    device: int
    inode: int
    closed: bool = False


class MountRecord(Value, frozen=True):
    """What custody knows of the mount: its boot, where it was, whose each guest's files are, and what they show."""

    boot_id: str
    mountpoint: str = ""
    owners: dict[str, int] = msgspec.field(default_factory=dict)
    shown: tuple[ShownFile, ...] = ()


def stored(custody: Custody, boot_id: str) -> tuple[MountRecord, Any]:
    """What custody knows of the mount, and what of that is unknown here; what cannot be read is put aside."""
    if MOUNT not in custody.names():
        return MountRecord(boot_id), None
    fd, _ = custody.get(MOUNT)
    try:
        raw = os.pread(fd, os.fstat(fd).st_size, 0)
        table = payloads.read(MOUNT, raw, MountRecord)
        return table, newer.rest(raw, table)
    except BadFile:
        custody.put(UNREAD, fd)
        return MountRecord(boot_id), None
    finally:
        os.close(fd)


def store(custody: Custody, record: MountRecord, rest: Any) -> None:
    """Have custody know of it, with what of an earlier one is unknown here (``rest``)."""
    fd = os.memfd_create("memconsole-mount", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(newer.encode(record, rest))
        custody.put(MOUNT, fd)
    finally:
        os.close(fd)
