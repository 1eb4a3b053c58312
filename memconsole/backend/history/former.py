"""Histories of format 1, files that memconsole wrote by hand: read once, when they are taken over into the store.

Grammar of a file (little-endian)::

    file   = "MCHISTRY" version:u32 zero:u32 frame*
    frame  = key:u64 len:u32 payload_crc:u32 zero:u32 head_crc:u32 payload
    payload                         a piece of the file's one raw deflate stream, ended by a sync flush; it inflates
                                    to the first frame's Snapshot as JSON, or to what changed since the frame before

``key`` is what it is in the store (:mod:`.store`), and what a payload inflates to is as well.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from memconsole import decoding
from memconsole.backend.history.store import LARGEST_FRAME
from memconsole.errors import BadFile

MAGIC = b"MCHISTRY"
SUFFIX = ".history"
FORMAT = 1

_START = struct.Struct("<8sII")
_HEAD = struct.Struct("<QIIII")


def check(path: Path) -> None:
    """Nothing, for a file that begins as a history of this format.

    Raises:
        BadFile: it does not.
    """
    with path.open("rb") as file:
        _check_start(file.read(_START.size), path)


def texts(path: Path) -> Iterator[tuple[int, bytes]]:
    """The key and the JSON text of every frame of a file, in order.

    Raises:
        BadFile: it cannot be read, is no history of this format, or is damaged behind what was yielded.
    """
    inflater = decoding.Inflater(limit=LARGEST_FRAME)
    with path.open("rb") as file:
        _check_start(file.read(_START.size), path)
        position = 0
        while head := file.read(_HEAD.size):
            key, payload = _frame(head, file, f"frame {position} of {path}")
            yield key, inflater.inflate(payload, what=f"frame {position} of {path}")
            position += 1


def _check_start(raw: bytes, path: Path) -> None:
    if len(raw) < _START.size or raw[:8] != MAGIC:
        raise BadFile(f"{path} is no history", "it does not begin as one", "choose another file")
    version = _START.unpack(raw)[1]
    if version != FORMAT:
        raise BadFile(f"{path} is of version {version}", "this memconsole does not know it", "use the newer memconsole")


def _frame(head: bytes, file: IO[bytes], what: str) -> tuple[int, bytes]:
    if len(head) < _HEAD.size:
        raise BadFile(f"{what} is damaged", "its head is truncated", "memconsole inspect FILE says what is left")
    key, length, crc, _, head_crc = _HEAD.unpack(head)
    if head_crc != zlib.crc32(head[:-4]):
        raise BadFile(
            f"{what} is damaged", "the checksum of its head does not match", "memconsole inspect FILE says what is left"
        )
    payload = file.read(length)
    if len(payload) != length or zlib.crc32(payload) != crc:
        raise BadFile(f"{what} is damaged", "its checksum does not match", "memconsole inspect FILE says what is left")
    return key, payload
