"""What a descriptor holds, as values: for connections that cannot take descriptors, such as those over ssh's stdio.

A connection says so in its greeting (``Hello`` with ``inline``). A reply with descriptors then has an
:class:`InlinePart` for each, its first bytes, and the service keeps the descriptors for ``ReadDescriptor`` until the
last is read up, or the next other call of the connection. A part is at most ``PART`` bytes, deflated; what lies between
two parts is a hole.
"""

from __future__ import annotations

import base64
import binascii
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from memconsole import decoding
from memconsole.errors import Gone, WireError
from memconsole.model.base import Value

PART = 1 << 20
"""The most bytes of a part, before they are deflated."""
MAX_TABLE = 1 << 30
"""The most bytes of a table that a client keeps in memory: some 40 million extents."""
_LEVEL = 1
_UPGRADE = "upgrade the older of the two memconsoles, then restart the service"


class InlinePart(Value, frozen=True):
    """Bytes of a file of ``size`` bytes: ``length`` from ``at`` on, as base64 of a zlib stream; none are left of 0."""

    size: int
    at: int
    length: int
    data: str

    @property
    def ends(self) -> bool:
        """Whether nothing comes after it."""
        return self.at + self.length >= self.size


def piece(fd: int, at: int, most: int) -> tuple[int, bytes]:
    """The next bytes at or after ``at`` that are no hole, and where they begin; none, at the end of the file."""
    try:
        start = os.lseek(fd, at, os.SEEK_DATA)
    except OSError:  # ENXIO: only a hole is left
        return os.fstat(fd).st_size, b""
    end = os.lseek(fd, start, os.SEEK_HOLE)
    return start, os.pread(fd, min(most, end - start), start)


def part(fd: int, at: int) -> InlinePart:
    """The next part of what a descriptor holds, at or after ``at``."""
    start, found = piece(fd, at, PART)
    packed = base64.b64encode(zlib.compress(found, _LEVEL)).decode("ascii", "strict")
    return InlinePart(os.fstat(fd).st_size, start, len(found), packed)


def unpacked(found: InlinePart, at: int, what: str) -> bytes:
    """The bytes of a part that was asked for from ``at`` on.

    Raises:
        WireError: it is not what it says it is, or more than a part may be.
    """
    if not (0 <= found.length <= PART and at <= found.at and found.at + found.length <= found.size):
        raise WireError(f"a part of {what} cannot be read", "its place is not in the file", _UPGRADE)
    try:
        packed = base64.b64decode(found.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"a part of {what} cannot be read", str(error), _UPGRADE) from None
    try:
        contents = decoding.inflated(packed, what=f"a part of {what}", limit=max(1, found.length))
    except decoding.Undecodable as error:
        raise WireError(error.what, error.why, _UPGRADE) from None
    if len(contents) != found.length:
        raise WireError(f"a part of {what} cannot be read", f"it has {len(contents)} bytes", _UPGRADE)
    return contents


class Segment(Protocol):
    """A segment of a region, to be read once: ``size`` bytes, holes included."""

    size: int

    def data(self) -> Iterator[tuple[int, bytes]]:
        """What it holds but for its holes: where bytes begin, and the bytes.

        Raises:
            Gone: it was made shorter meanwhile.
        """


class OpenSegment:
    """A segment that came as a descriptor, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._fd = fd

    def data(self) -> Iterator[tuple[int, bytes]]:
        """See :class:`Segment`."""
        at = 0
        while at < self.size:
            at, found = piece(self._fd, at, min(4 * PART, self.size - at))
            if os.fstat(self._fd).st_size < self.size:
                raise _shorter()
            if found:
                yield at, found
            at += len(found)


class InlineSegment:
    """A segment that comes by parts; ``ask`` gets the next one at or after a place."""

    def __init__(self, first: InlinePart, ask: Callable[[int], InlinePart], what: str) -> None:
        self.size = first.size
        self._first = first
        self._ask = ask
        self._what = what

    def data(self) -> Iterator[tuple[int, bytes]]:
        """See :class:`Segment`."""
        found, at = self._first, 0
        while True:
            if found.size < self.size:
                raise _shorter()
            contents = unpacked(found, at, self._what)
            if contents:
                yield found.at, contents
            if found.ends or not contents:
                return
            at = found.at + found.length
            found = self._ask(at)


def _shorter() -> Gone:
    return Gone("the region was truncated while it was copied", "a guest made its file shorter", "copy it again")


def whole(segment: InlineSegment, what: str) -> bytearray:
    """All of a small file that comes by parts.

    Raises:
        WireError: it is larger than a table may be.
    """
    if not 0 <= segment.size <= MAX_TABLE:
        raise WireError(f"{what} cannot be kept", f"it has {segment.size} bytes, more than {MAX_TABLE}")
    kept = bytearray(segment.size)
    for at, found in segment.data():
        kept[at : at + len(found)] = found
    return kept
