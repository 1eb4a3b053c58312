"""The unix sockets of this host, and which are connected to each other (sock_diag(7), UNIX_DIAG).

A dump is a datagram of netlink messages::

    message  = u32 length, u16 type, u16 flags, u32 seq, u32 pid    type 20 a socket, 3 the end, 2 an error (s32)
    socket   = u8 family, u8 type, u8 state, u8 pad, u32 inode, u32 cookie[2], attribute*
    attribute = u16 length, u16 type, value, padding to 4            type 2: the inode of its peer (u32)

It has the sockets of this process's network namespace.
"""

from __future__ import annotations

import errno
import socket
import struct

from memconsole.backend.kernel import tree
from memconsole.errors import KernelRefused, NotFound

_SOURCE = "sock_diag of unix sockets"
_NETLINK_SOCK_DIAG, _BY_FAMILY = 4, 20
_REQUEST, _DUMP = 0x1, 0x300
_ERROR, _DONE = 2, 3
_ESTABLISHED, _SHOW_PEER, _PEER = 1, 0x4, 2
_HEAD = struct.Struct("=IHHII")
_QUESTION = struct.Struct("=BBHIIIII")
_SOCKET = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")
_ANSWER_S = 5.0
_ROOM = 1 << 18


def peers() -> dict[int, int]:
    """The inode of the peer of every connected unix socket, by its own.

    Raises:
        NotFound: this kernel does not tell (CONFIG_UNIX_DIAG). Denied, KernelRefused, BadFile: it cannot be read.
    """
    question = _QUESTION.pack(socket.AF_UNIX, 0, 0, 1 << _ESTABLISHED, 0, _SHOW_PEER, 0, 0)
    head = _HEAD.pack(_HEAD.size + len(question), _BY_FAMILY, _REQUEST | _DUMP, 1, 0)
    found: dict[int, int] = {}
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as asked:
            asked.settimeout(_ANSWER_S)
            asked.send(head + question)
            while not parse(asked.recv(_ROOM), found):
                pass
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT}:
            raise NotFound(f"there is no {_SOURCE}", "the kernel has no CONFIG_UNIX_DIAG") from None
        if error.errno is None:  # the time it had is over
            raise KernelRefused(_SOURCE, errno.ETIMEDOUT) from None
        raise tree.failure(_SOURCE, error) from error
    return found


def parse(raw: bytes, found: dict[int, int]) -> bool:
    """Add the pairs of a datagram to ``found``; whether the dump has ended with it.

    Raises:
        BadFile: it is not as the kernel writes it. OSError: it says that the question cannot be answered.
    """
    at = 0
    try:
        while at < len(raw):
            length, type, *_ = _HEAD.unpack_from(raw, at)
            if length < _HEAD.size or at + length > len(raw):
                raise tree.malformed(_SOURCE, raw[at : at + 32])
            if type == _DONE:
                return True
            if type == _ERROR:
                (number,) = struct.unpack_from("=i", raw, at + _HEAD.size)
                raise OSError(-number, "sock_diag")
            if type == _BY_FAMILY:
                _socket(raw[at + _HEAD.size : at + length], found)
            at += length + -length % 4
    except struct.error as error:
        raise tree.malformed(_SOURCE, raw[at : at + 32]) from error
    return False


def _socket(raw: bytes, found: dict[int, int]) -> None:
    _, _, _, _, inode, _, _ = _SOCKET.unpack_from(raw)
    at = _SOCKET.size
    while at < len(raw):
        length, type = _ATTRIBUTE.unpack_from(raw, at)
        if length < _ATTRIBUTE.size:
            raise tree.malformed(_SOURCE, raw[at : at + 32])
        if type == _PEER:
            (found[inode],) = struct.unpack_from("=I", raw, at + _ATTRIBUTE.size)
        at += length + -length % 4
