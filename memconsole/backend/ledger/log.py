"""What we meant: a checksummed log in its own memfd, which lives exactly as long as the memory it describes.

Grammar of a ledger image (little-endian)::

    image      = superblock[2] area*                 superblock n stands at n * 4096, areas follow from 8192
    superblock = "MCLEDGER" version:u32 crc:u32 generation:u64 start:u64 capacity:u64 seq:u64 chain:char[64]
    area       = frame* zero*                        at ``start``, ``capacity`` bytes; zeros to its end
    frame      = len:u32 type:u16 zero:u16 seq:u64 payload crc:u32 pad     ``len`` counts all but pad; pad to 8 bytes

``crc`` of a superblock covers it with that field zero; ``crc`` of a frame covers all before it and starts from the
generation, so a frame of an earlier generation is never taken for one of this. ``seq`` rises by one a frame, from the
superblock's. ``chain`` is the boot id of the kernel the memory was first reserved under; it stays the same over
handoffs and cannot survive a power cycle. The checksum is zlib's CRC-32: it needs no native code to verify offline,
and at the size of a record it costs no more than CRC-32C would.

Every append is two stores: the frame behind its length, then the length. A process killed anywhere in between leaves
a length of zero and bytes behind it, which is a torn tail. Compaction writes the new area beside the old one, then the
new superblock, then wipes the old one: at every moment exactly one newest superblock is whole, and one that was whole
and is not any more is damage, not an occasion to believe an older one.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from memconsole import decoding
from memconsole.errors import BadFile, KernelRefused, Refused, UsageError
from memconsole.model import Finding, Severity

MAGIC = b"MCLEDGER"
VERSION = 1
"""Raised when an older memconsole must not work on the ledger: a record that cannot be passed over, a field without a
default, one that means something else, a new value of an enumeration. Not for a new kind of record or a new field with
a default: those are kept and told of (:mod:`memconsole.backend.ledger.state`)."""
MAX_PAYLOAD = 1 << 20
MAX_CAPACITY = 256 << 20
CAPACITY = 256 << 10

_SLOT = 4096
_AREAS = 2 * _SLOT
_SUPER = struct.Struct("<8sIIQQQQ64s")
_FRAME = struct.Struct("<IHHQ")
_CRC = struct.Struct("<I")
_FRAMING = _FRAME.size + _CRC.size

Buffer = bytes | mmap.mmap


class RecordKind(enum.IntEnum):
    """What a record says; ``STATE`` opens a compacted ledger with what the records before it amounted to."""

    INTENT = 1
    DONE = 2
    FAILED = 3
    EVENT = 4
    STATE = 5


class Record(NamedTuple):
    """One record as it was appended."""

    seq: int
    kind: int
    payload: bytes

    def value(self) -> Any:
        """The payload as plain JSON values.

        Raises:
            BadFile: the payload is not JSON.
        """
        return decoding.json(self.payload, what=f"ledger record {self.seq}")


class CutTail(msgspec.Struct, frozen=True):
    """What was cut: ``length`` bytes at ``offset`` of the image, behind record ``after_seq``, and why.

    ``torn`` is an append that never ended, so nobody was told it was done; otherwise committed records may be lost.
    """

    offset: int
    length: int
    after_seq: int
    torn: bool
    why: str

    def finding(self) -> Finding:
        """The cut as a finding."""
        return Finding(
            id="ledger-torn" if self.torn else "ledger-corrupt",
            severity=Severity.WARNING if self.torn else Severity.ERROR,
            subject="ledger",
            observed=f"the ledger was cut behind record {self.after_seq}: {self.why}",
            evidence=f"{self.length} bytes at offset {self.offset}",
            remedy="nothing need be done: the action that was under way was never acknowledged; repeat it"
            if self.torn
            else "compare regions and grants with what the kernel shows; the audit trail may hold the lost records",
        )


class Superblock(msgspec.Struct, frozen=True):
    """Where the records of a generation stand: bytes from the image's begin, and the first record's ``seq``."""

    generation: int
    start: int
    capacity: int
    seq: int
    chain: str

    def pack(self) -> bytes:
        """The superblock as it is stored."""
        fields = (self.generation, self.start, self.capacity, self.seq, self.chain.encode())
        crc = zlib.crc32(_SUPER.pack(MAGIC, VERSION, 0, *fields))
        return _SUPER.pack(MAGIC, VERSION, crc, *fields)


class LedgerImage(msgspec.Struct, frozen=True):
    """A ledger as it was read: its superblock, its records, where they end, and the damage behind them."""

    superblock: Superblock
    records: tuple[Record, ...]
    end: int
    dropped: CutTail | None


def _read_superblock(data: Buffer, slot: int) -> Superblock | None:
    """The superblock in a slot, or None if there is no whole one.

    Raises:
        BadFile: it is whole, and of a newer version.
    """
    raw = data[slot * _SLOT : slot * _SLOT + _SUPER.size]
    if len(raw) < _SUPER.size or raw[:8] != MAGIC:
        return None
    _, version, crc, generation, start, capacity, seq, chain = _SUPER.unpack(raw)
    if crc != zlib.crc32(raw[:12] + bytes(4) + raw[16:]):
        return None
    if version != VERSION:
        raise BadFile(
            f"the ledger is of version {version}",
            f"this memconsole knows version {VERSION}",
            "use the newer memconsole",
        )
    return Superblock(generation, start, capacity, seq, decoding.text(chain.rstrip(b"\0")))


def _newest_superblock(data: Buffer) -> Superblock:
    if not any(data[slot * _SLOT : slot * _SLOT + 8] == MAGIC for slot in (0, 1)):
        raise BadFile("this is not a ledger", "it does not begin as one", "choose another file")
    blocks = [block for slot in (0, 1) if (block := _read_superblock(data, slot)) is not None]
    if not blocks:
        raise BadFile(
            "the ledger is corrupt",
            "neither of its superblocks is whole",
            "start with an empty ledger; what the kernel and custody hold is then reported as unknown",
        )
    return max(blocks, key=lambda block: block.generation)


def _frame_size(length: int) -> int:
    return (length + 7) & ~7


def _encode(payload: object) -> bytes:
    raw = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
    if len(raw) > MAX_PAYLOAD:
        raise Refused(
            f"a record of {len(raw)} bytes is too long",
            f"at most {MAX_PAYLOAD} fit",
            "make the action smaller: fewer arguments",
            code="RecordTooLong",
        )
    return raw


def _pack_frame(record: Record, generation: int) -> bytes:
    length = _FRAMING + len(record.payload)
    head = _FRAME.pack(length, record.kind, 0, record.seq) + record.payload
    return (head + _CRC.pack(zlib.crc32(head, generation & 0xFFFFFFFF))).ljust(_frame_size(length), b"\0")


class _Damage(NamedTuple):
    torn: bool
    why: str


def _at(area: bytes, at: int, seq: int, generation: int) -> Record | _Damage | None:
    """What stands at ``at``: a record, damage, or None where the log ends."""
    rest = len(area) - at
    if rest < _FRAME.size or area[at : at + 4] == bytes(4):
        return _Damage(True, "the last append did not end") if area[at:].strip(b"\0") else None
    length, kind, zero, found = _FRAME.unpack_from(area, at)
    if not _FRAMING <= length <= min(rest, MAX_PAYLOAD + _FRAMING):
        return _Damage(False, f"a record has an impossible length, {length} bytes")
    end = at + length - _CRC.size
    if _CRC.unpack_from(area, end)[0] != zlib.crc32(area[at:end], generation & 0xFFFFFFFF):
        return _Damage(False, "its checksum does not match")
    if found != seq or zero:
        return _Damage(False, f"it is record {found} where {seq} was expected")
    if any(area[end + _CRC.size : at + _frame_size(length)]):
        return _Damage(False, "there are bytes where zeros belong")
    return Record(seq, kind, area[at + _FRAME.size : end])


def _whole_frames(area: bytes, at: int, seq: int, generation: int) -> int:
    """How many records behind damage still have their checksum: evidence of what a cut costs, never believed."""
    found = 0
    while at <= len(area) - _FRAMING:
        length, _, _, number = _FRAME.unpack_from(area, at)
        end = at + length - _CRC.size
        if (
            _FRAMING <= length <= min(len(area) - at, MAX_PAYLOAD + _FRAMING)
            and seq < number < seq + len(area) // _FRAMING
            and _CRC.unpack_from(area, end)[0] == zlib.crc32(area[at:end], generation & 0xFFFFFFFF)
        ):
            found += 1
            at += _frame_size(length)
        else:
            at += 8
    return found


def read(data: Buffer) -> LedgerImage:
    """The ledger in an image; nothing is written, and nothing behind the first damage is believed.

    Raises:
        BadFile: not a ledger, one of a newer version, or one without a whole superblock.
    """
    block = _newest_superblock(data)
    area = bytes(data[block.start : block.start + block.capacity])
    missing = block.capacity - len(area)
    records: list[Record] = []
    at, seq = 0, block.seq
    while isinstance(found := _at(area, at, seq, block.generation), Record):
        records.append(found)
        at += _frame_size(_FRAMING + len(found.payload))
        seq += 1
    dropped = None
    if missing:
        why = f"the image ends {missing} bytes early"
        dropped = CutTail(block.start + at, block.capacity - at, seq - 1, torn=False, why=why)
    elif found is not None:
        lost = _whole_frames(area, at + 8, seq, block.generation)
        why = found.why + (f"; {lost} whole records behind it are not believed either" if lost else "")
        length = len(area[at:].rstrip(b"\0"))
        dropped = CutTail(block.start + at, length, seq - 1, torn=found.torn and not lost, why=why)
    return LedgerImage(block, tuple(records), block.start + at, dropped)


class Ledger:
    """A ledger in a memfd, to be appended to by one process; every method may be called from any thread.

    ``dropped`` is what was cut when it was opened, if anything; ``fd`` is the memfd, for custody.
    """

    def __init__(self, fd: int, map: mmap.mmap, image: LedgerImage) -> None:
        self.fd = fd
        self.dropped = image.dropped
        self._map = map
        self._block = image.superblock
        self._end = image.end
        self._count = self._compacted = len(image.records)
        self._lock = threading.Lock()

    @classmethod
    def create(cls, chain: str, *, capacity: int = CAPACITY) -> Ledger:
        """An empty ledger in a new memfd; ``chain`` is the boot id of this kernel, ``capacity`` is in bytes.

        Raises:
            KernelRefused: there is no memory for it.
        """
        if len(chain.encode()) > 64 or not chain:
            raise UsageError("a chain id is 1 to 64 bytes long", f"{chain!r} is not")
        capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        fd = os.memfd_create("memconsole-ledger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            map = _reach(fd, _AREAS + capacity)
        except BaseException:
            os.close(fd)
            raise
        block = Superblock(1, _AREAS, capacity, 1, chain)
        map[_SLOT : _SLOT + _SUPER.size] = block.pack()
        return cls(fd, map, LedgerImage(block, (), _AREAS, None))

    @classmethod
    def open(cls, fd: int) -> Ledger:
        """The ledger in a memfd, which it takes over; a torn or corrupt tail is cut, and ``dropped`` says so.

        Raises:
            BadFile: not a ledger, one of a newer version, or one without a whole superblock; ``fd`` stays open.
            KernelRefused: the fd cannot be mapped for writing.
        """
        size = os.fstat(fd).st_size
        if size < _AREAS:
            raise BadFile("this is not a ledger", f"{size} bytes cannot hold one", "choose another file")
        map = _map(fd, size)
        try:
            image = read(map)
            block = image.superblock
            if block.start + block.capacity > size:
                whole = _reach(fd, block.start + block.capacity)
                map.close()
                map = whole
        except BaseException:
            map.close()
            raise
        if image.dropped is not None:
            map[image.end : block.start + block.capacity] = bytes(block.start + block.capacity - image.end)
        other = (block.generation + 1) % 2 * _SLOT
        map[other : other + _SUPER.size] = bytes(_SUPER.size)
        return cls(fd, map, image)

    @property
    def chain(self) -> str:
        """The boot id of the kernel under which this ledger was made."""
        return self._block.chain

    @property
    def generation(self) -> int:
        """How often the ledger was made, compacted or grown."""
        return self._block.generation

    @property
    def next_seq(self) -> int:
        """The sequence number the next record will have."""
        return self._block.seq + self._count

    @property
    def used(self) -> int:
        """Bytes of the present area that hold records."""
        return self._end - self._block.start

    @property
    def worth_compacting(self) -> bool:
        """Whether enough was appended since the last compaction that one pays."""
        return self._count > 4 * self._compacted + 1024

    def append(self, kind: int, payload: object = b"") -> int:
        """Commit a record and return its ``seq``; a payload that is not bytes is written as JSON.

        Raises:
            Refused: the payload is over 1 MiB (``RecordTooLong``), or the ledger is at its limit (``LedgerFull``).
            KernelRefused: the ledger had to grow and could not; nothing was written.
        """
        raw = _encode(payload)
        with self._lock:
            block = self._block
            seq = block.seq + self._count
            frame = _pack_frame(Record(seq, kind, raw), block.generation)
            if self._end + len(frame) > block.start + block.capacity:
                self._rewrite(read(self._map).records, block.seq, spare=len(frame))
                frame = _pack_frame(Record(seq, kind, raw), self._block.generation)
            at, end = self._end, self._end + len(frame)
            self._map[at + 4 : end] = frame[4:]
            self._map[at : at + 4] = frame[:4]
            self._end = end
            self._count += 1
        return seq

    def records(self, after: int = 0) -> Iterator[Record]:
        """The records with a ``seq`` above ``after``, oldest first, as they stand at the call."""
        with self._lock:
            found = read(self._map).records
        return (record for record in found if record.seq > after)

    def compact(self, records: Iterable[tuple[int, object]]) -> None:
        """Put ``records`` (kind and payload of each) in the place of all there are; numbering goes on.

        Raises:
            Refused, KernelRefused: as :meth:`append`; the ledger stays as it was.
        """
        with self._lock:
            first = self.next_seq
            fresh = [Record(first + n, kind, _encode(payload)) for n, (kind, payload) in enumerate(records)]
            self._rewrite(fresh, first, spare=0)
            self._compacted = self._count

    def image(self) -> bytes:
        """The whole ledger as bytes, which ``memconsole inspect`` reads."""
        with self._lock:
            return self._map[:]

    def close(self) -> None:
        """Close the memfd; what custody holds of it stays."""
        self._map.close()
        os.close(self.fd)

    def _rewrite(self, records: Iterable[Record], seq: int, spare: int) -> None:
        """Write ``records`` into another area, large enough for them twice and ``spare`` bytes, and switch to it."""
        old = self._block
        kept = list(records)
        frames = b"".join(_pack_frame(record, old.generation + 1) for record in kept)
        capacity = min(CAPACITY, old.capacity)
        while capacity < 2 * (len(frames) + spare):
            capacity *= 2
        if capacity > MAX_CAPACITY:
            raise Refused(
                "the ledger is full",
                f"it would exceed {MAX_CAPACITY} bytes",
                "release regions and guests that are not needed",
                code="LedgerFull",
            )
        start = _AREAS if _AREAS + capacity <= old.start else old.start + old.capacity
        if start + capacity > len(self._map):
            grown = _reach(self.fd, start + capacity)
            self._map.close()
            self._map = grown
        block = Superblock(old.generation + 1, start, capacity, seq, old.chain)
        self._map[start : start + capacity] = frames.ljust(capacity, b"\0")
        slot = block.generation % 2 * _SLOT
        self._map[slot : slot + _SUPER.size] = block.pack()
        other = old.generation % 2 * _SLOT
        self._map[other : other + _SUPER.size] = bytes(_SUPER.size)
        self._block, self._end, self._count = block, start + len(frames), len(kept)


def _map(fd: int, size: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size)
    except OSError as error:
        raise KernelRefused("mmap of the ledger", error.errno or 0) from None


def _reach(fd: int, size: int) -> mmap.mmap:
    """A mapping of ``fd`` after it got ``size`` bytes, all of them allocated: a store must never meet SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise KernelRefused(
            "fallocate of the ledger",
            error.errno or 0,
            what=f"the ledger cannot grow to {size} bytes",
            remedy="free memory, then repeat; the ledger is as it was",
            code="LedgerFull",
        ) from None
    return _map(fd, size)
