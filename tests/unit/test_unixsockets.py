"""Which unix sockets are connected: as this kernel says, and what a broken answer of it is."""

from __future__ import annotations

import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.kernel import unixsockets
from memconsole.errors import BadFile


def message(type: int, body: bytes) -> bytes:
    return (struct.pack("=IHHII", 16 + len(body), type, 0, 1, 0) + body).ljust(-(-(16 + len(body)) // 4) * 4, b"\0")


def shown(inode: int, *attributes: tuple[int, bytes]) -> bytes:
    """A socket with attributes."""
    body = struct.pack("=BBBBIII", 1, 1, 1, 0, inode, 0, 0)
    for type, value in attributes:
        body += (struct.pack("=HH", 4 + len(value), type) + value).ljust(-(-(4 + len(value)) // 4) * 4, b"\0")
    return message(20, body)


def test_each_end_of_a_connection_is_the_peer_of_the_other() -> None:
    one, other = socket.socketpair()
    with one, other, socket.socket(socket.AF_UNIX) as alone:
        found = unixsockets.peers()
        inodes = [os.fstat(each.fileno()).st_ino for each in (one, other, alone)]
        assert found[inodes[0]] == inodes[1]
        assert found[inodes[1]] == inodes[0]
        assert inodes[2] not in found


def test_a_dump_goes_on_over_datagrams_and_other_attributes() -> None:
    found: dict[int, int] = {}
    peer = struct.pack("=I", 22)
    assert not unixsockets.parse(shown(11, (0, b"/run/x"), (2, peer), (4, b"12345678")) + shown(12), found)
    assert unixsockets.parse(shown(13, (2, struct.pack("=I", 0xFFFFFFFF))) + message(3, bytes(4)), found)
    assert found == {11: 22, 13: 0xFFFFFFFF}


def test_an_error_of_the_kernel_is_raised_as_one() -> None:
    with pytest.raises(FileNotFoundError):
        unixsockets.parse(message(2, struct.pack("=i", -2) + bytes(16)), {})


@pytest.mark.parametrize("cut", range(1, len(shown(11, (2, bytes(4))))))
def test_an_answer_that_is_cut_short_is_no_answer(cut: int) -> None:
    with pytest.raises(BadFile):
        unixsockets.parse(shown(11, (2, bytes(4)))[:cut], {})


@given(st.binary(max_size=200))
def test_whatever_it_says_ends_in_a_named_error(raw: bytes) -> None:
    for data in (raw, message(20, raw)):
        try:
            unixsockets.parse(data, {})
        except (BadFile, OSError):
            continue
