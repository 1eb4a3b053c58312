"""A vhost-user backend, as little of one as QEMU's vhost-user-blk needs to hand it the guest's memory.

    message = u32 request, u32 flags (version 1, 4 a reply), u32 size, body; descriptors go along (SCM_RIGHTS)

Run as a program with the path of a socket to listen on: it says ``listens``, then ``mapped N`` for each table of memory
it was handed, and never serves a request.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys

_HEAD = struct.Struct("<III")
_REGION = struct.Struct("<QQQQ")
_REPLY = 0x5
_FEATURES, _PROTOCOL_FEATURES = 1 << 30 | 1 << 32, 1 << 9
"""VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1; VHOST_USER_PROTOCOL_F_CONFIG."""
_GET_FEATURES, _SET_MEM_TABLE, _GET_VRING_BASE, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM, _GET_CONFIG = (
    1,
    5,
    11,
    15,
    17,
    24,
)
_NUMBERS = {_GET_FEATURES: _FEATURES, _GET_PROTOCOL_FEATURES: _PROTOCOL_FEATURES, _GET_QUEUE_NUM: 1}


def _answer(request: int, body: bytes) -> bytes | None:
    if request in _NUMBERS:
        return struct.pack("<Q", _NUMBERS[request])
    if request == _GET_VRING_BASE:
        return body
    if request == _GET_CONFIG:  # a disk of 1024 sectors
        return body[:12] + struct.pack("<Q", 1024).ljust(len(body) - 12, b"\0")
    return None


def _map(body: bytes, fds: list[int]) -> list[mmap.mmap]:
    regions = _REGION.iter_unpack(body[8 : 8 + len(fds) * _REGION.size])
    found = [mmap.mmap(fd, offset + size) for fd, (_, size, _, offset) in zip(fds, regions, strict=True)]
    for fd in fds:
        os.close(fd)
    return found


def main(path: str) -> None:
    """Serve one QEMU until it ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("listens", flush=True)
    front, _ = listener.accept()
    memory: list[mmap.mmap] = []
    while True:
        head, fds, _, _ = socket.recv_fds(front, _HEAD.size, 8)
        if not head:
            return
        request, _, size = _HEAD.unpack(head)
        body = front.recv(size, socket.MSG_WAITALL) if size else b""
        if request == _SET_MEM_TABLE:
            memory = _map(body, fds)
            print("mapped", len(memory), flush=True)
        answer = _answer(request, body)
        if answer is not None:
            front.sendall(_HEAD.pack(request, _REPLY, len(answer)) + answer)


if __name__ == "__main__":
    main(sys.argv[1])
