r"""What a range of memory without a file system says of itself: two copies of one description, the newer counts.

    unit 0 (2 MiB)       copy 0 at 0, copy 1 at 1 MiB
    unit 1 ...           regions, each one run of units
    copy                 head, then ``length`` bytes of JSON: a :class:`Description`
    head                 u8[8] "MCRANGE\\0"  u32 format  u32 0  u64 generation  u64 length  u64 size  u8[32] sum
    sum                  SHA-256 of the head (its own place zeros) and the JSON; ``size`` that of the whole range

All numbers are little-endian; the head is the same in every format. A change is written over the older copy, so one
that was cut short anywhere leaves the other copy as it was. One valid copy is there from the end of the first write on.
"""

from __future__ import annotations

import enum
import hashlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from memconsole import decoding
from memconsole.actions import NAME
from memconsole.errors import BadFile
from memconsole.model import Grant, Region, Value
from memconsole.units import format_size

UNIT = 2 << 20
"""What a range is given out in, and what it begins with: its description."""
COPY = UNIT // 2
FORMAT = 1
MAGIC = b"MCRANGE\0"
HEAD = struct.Struct("<8sIIQQQ32s")
_SUM = HEAD.size - 32
_LATER = "start the memconsole that wrote it; until then it is left as it is"
_OTHER_SIZE = "memconsole arena grow NAME has the arena have all of its range; until then it is left as it is"
_BROKEN = "it is left as it is; what it says cannot be mended from outside"


class Piece(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A run of a range in bytes; without a ``region`` it was never finished, and counts for nothing."""

    name: str
    start: int
    size: int
    region: Region | None = None
    grants: tuple[Grant, ...] = ()


class Description(Value, frozen=True, kw_only=True):
    """What is in a range; ``host`` is the machine id of the host that made it."""

    name: str
    host: str = ""
    created_ns: int = 0
    pieces: tuple[Piece, ...] = ()

    def piece(self, name: str) -> Piece | None:
        """The piece of this name."""
        return next((each for each in self.pieces if each.name == name), None)


class Kind(enum.Enum):
    """What a copy is."""

    BLANK = "blank"
    FOREIGN = "foreign"
    TORN = "torn"
    NEWER = "newer"
    GOOD = "good"


class Copy(NamedTuple):
    """One copy; ``body`` is the JSON of one that is whole, ``size`` that of the range it is of."""

    kind: Kind
    generation: int = 0
    format: int = 0
    body: bytes = b""
    size: int = 0


class Read(NamedTuple):
    """What was read: ``older`` is the number of the copy that the next change is written over.

    Without a description the range is ``empty`` (what is there was never finished, if anything), or ``foreign``.
    """

    description: Description | None
    generation: int
    older: int
    foreign: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing was ever described here, and nothing of somebody else's is in these places."""
        return self.description is None and not self.foreign


def copy_of(raw: bytes, size: int) -> Copy:
    """What the bytes of one copy are, in a range of so many bytes; reads :data:`COPY` of them at most."""
    raw = raw[:COPY]
    if not raw.startswith(MAGIC) or len(raw) < HEAD.size:
        return Copy(Kind.FOREIGN if any(raw) else Kind.BLANK)
    _, form, zero, generation, length, total, digest = HEAD.unpack_from(raw)
    if length > COPY - HEAD.size or zero or not generation:
        return Copy(Kind.TORN)
    body = raw[HEAD.size : HEAD.size + length]
    if len(body) != length or _digest(raw[:_SUM], body) != digest:
        return Copy(Kind.TORN)
    if form > FORMAT:
        return Copy(Kind.NEWER, generation, form)
    return Copy(Kind.GOOD if form == FORMAT and total == size else Kind.FOREIGN, generation, form, body, total)


def read(first: bytes, second: bytes, size: int, where: str) -> Read:
    """What a range of ``size`` bytes says, by the bytes of its copies.

    Raises:
        BadFile: it is of a newer memconsole, or of a range of another size, or nothing of it is whole, or what it says
            cannot be.
    """
    copies = (copy_of(first, size), copy_of(second, size))
    newest = max((0, 1), key=lambda each: copies[each].generation)
    found = copies[newest]
    if found.kind is Kind.NEWER:
        why = f"it is of format {found.format}, this memconsole reads {FORMAT}"
        raise BadFile(f"{where} is of a newer memconsole", why, _LATER)
    if found.kind is Kind.GOOD:
        return Read(_understood(found.body, size, where), found.generation, 1 - newest)
    kinds = {each.kind for each in copies}
    if found.generation:
        why = f"it says that it describes a range of {format_size(found.size)}, and this one has {format_size(size)}"
        raise BadFile(f"{where} does not say what it is", why, _OTHER_SIZE if found.size < size else _BROKEN)
    if kinds == {Kind.TORN}:
        raise BadFile(f"{where} does not say what it is", "neither copy of its description is whole", _BROKEN)
    return Read(None, 0, 0, foreign=Kind.FOREIGN in kinds)


def said_of_less(first: bytes, second: bytes, size: int, where: str) -> Read | None:
    """What a range of ``size`` bytes says that was smaller when it was said; None where it says no such thing.

    Raises:
        BadFile: what it says cannot be.
    """
    newest = max((copy_of(first, size), copy_of(second, size)), key=lambda each: each.generation)
    if newest.kind is not Kind.FOREIGN or newest.format != FORMAT or not UNIT < newest.size < size:
        return None
    return read(first, second, newest.size, where)


def written(description: Description, generation: int, size: int, where: str) -> bytes:
    """The bytes of a copy.

    Raises:
        BadFile: there is no room for so much.
    """
    import msgspec

    body = msgspec.json.encode(description)
    if len(body) > COPY - HEAD.size:
        why = f"{len(description.pieces)} regions take {len(body)} bytes, there is room for {COPY - HEAD.size}"
        raise BadFile(f"{where} has no room for another region", why, "use another range for it")
    head = HEAD.pack(MAGIC, FORMAT, 0, generation, len(body), size, bytes(32))[:_SUM]
    return head + _digest(head, body) + body


def place_for(description: Description, size: int, total: int) -> int | None:
    """Where a run of so many bytes is free in a range of ``total``: the first place; None where there is none."""
    at = UNIT
    for each in sorted(description.pieces, key=lambda piece: piece.start):
        if each.start - at >= size:
            return at
        at = each.start + each.size
    return at if total // UNIT * UNIT - at >= size else None


def free(description: Description, total: int) -> tuple[int, int]:
    """The bytes of a range of ``total`` that are free, and those of the largest run of them."""
    runs, at = [0], UNIT
    for each in sorted(description.pieces, key=lambda piece: piece.start):
        runs.append(each.start - at)
        at = each.start + each.size
    runs.append(total // UNIT * UNIT - at)
    return sum(runs), max(runs)


def _digest(head: bytes, body: bytes) -> bytes:
    return hashlib.sha256(head + bytes(32) + body).digest()


def _understood(body: bytes, size: int, where: str) -> Description:
    said = decoding.json(body, Description, what=f"what {where} says of itself", remedy=_LATER)
    for why in _wrong(said, size):
        raise BadFile(f"{where} does not say what it is", why, _BROKEN)
    return said


def _wrong(said: Description, size: int) -> Iterator[str]:
    if not re.fullmatch(NAME, said.name):
        yield f"{said.name!r} is no name of an arena"
    at, names = UNIT, set[str]()
    for each in sorted(said.pieces, key=lambda piece: piece.start):
        if not re.fullmatch(NAME, each.name) or each.name in names:
            yield f"{each.name!r} is no name of a region, or is there twice"
        if each.start % UNIT or each.size % UNIT or each.size <= 0 or not at <= each.start <= size - each.size:
            yield f"{each.name} is said to be in {each.size} bytes at {each.start:#x}"
        if each.region is not None and (each.region.name, each.region.size) != (each.name, each.size):
            yield f"{each.name} says that it is region {each.region.name}, of {each.region.size} bytes"
        names.add(each.name)
        at = each.start + each.size
