"""The boot plan: what the early path does after a jump, before any Python runs; it stands at the manifest's start.

The grammar stands at the top of ``native/bootplan.h``, and the reader there is the one that counts: it keeps what a
broken plan still says to keep. This is the writer, and a reader for reports, tests and ``memconsole inspect``.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from memconsole.errors import BadFile, UsageError
from memconsole.model import Value
from memconsole.units import PAGE

VERSION = 1
"""Raised when ``PLAN_VERSION`` of ``native/bootplan.h`` is, by the rule there."""
RESUME_VERSION = 1
"""Raised when ``RECORD_VERSION`` of ``native/resume.c`` is, by the rule there."""
MANIFEST_SESSION = "memconsole:manifest"
MANIFEST_TOKEN = 1
MANIFEST, RESUME = "manifest", "resume"
"""What the manifest, and afterwards the record of the resume, are called in custody."""
STARTED = "started:"
"""Before a guest's name: the mark that its VMM was started (native/marks.h)."""
INCOMING = "incoming:"
"""Before a session's name in custody: of the kernel before, not finished; its payload has a line for each fd in it."""

_HEADER = struct.Struct("<8sIIIIQQQ")
_HEAD = struct.Struct("<4sIIHH")
_MAGIC, _RECORD = b"MCBOOTPL", b"MCRC"
_HOLD, _VERIFY, _START, _SAY, _FILE = 1, 2, 3, 4, 5
_CRC_AT = 12
_SESSION_MAX, _NAME_MAX, _PAYLOAD_MAX, _TEXT_MAX = 63, 200, 4096, 65535
_RECORD_MAX = 1 << 20
_FDS_MAX = 1000


class ClockReading(Value, frozen=True):
    """The same moment by three clocks; ``ticks`` (the processor's counter, 0 where unknown) go on over a kexec."""

    ticks: int = 0
    boottime_ns: int = 0
    realtime_ns: int = 0


class Hold(Value, frozen=True):
    """The fd of ``token`` in ``session`` goes into custody as ``name``, with ``payload``."""

    session: str
    token: int
    name: str
    payload: bytes = b""


class Verify(Value, frozen=True):
    """The pages of the first ``size`` bytes of ``name`` are where they were: hex of :meth:`ExtentTable.digest`."""

    name: str
    size: int
    digest: str


class Start(Value, frozen=True):
    """A VMM: its ``words``, working ``directory``, ``log``, owner, and fds of custody as (name, number 3 to 1023).

    It is started only if each of its fds is in custody, and none of them failed its :class:`Verify`, and goes on only
    where there is nothing at the paths ``unless``. ``groups``: besides its own. ``variables``: of its environment; of
    memconsole-resume's where there is none. ``directories``: made for it besides its own.
    """

    guest: str
    words: tuple[str, ...]
    directory: str
    log: str
    fds: tuple[tuple[str, int], ...] = ()
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    variables: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing that a memconsole-resume of before did not know."""
        return not (self.groups or self.variables or self.directories or self.unless)


class GuestFile(Value, frozen=True):
    """A file that says who runs a guest, written before it goes on; the first ``@PID@`` in it becomes its VMM's.

    Where one is there already, the guest is not started. ``early``: one that its VMM needs, written in any case.
    """

    guest: str
    path: str
    content: bytes
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    early: bool = False


class MonitorLines(Value, frozen=True):
    """A conversation with a guest's monitor: each line is said again until the answer contains its second text.

    ``within_ms``: how long the guest's process may sleep meanwhile; the time in which it was busy, or waited for a
    processor, is not held against it (``native/patience.h``).
    """

    guest: str
    socket: str
    lines: tuple[tuple[str, str], ...]
    within_ms: int = 30_000


class BootPlan(NamedTuple):
    """A boot plan. ``written`` is when; order within a kind is kept, kinds are written holds first."""

    holds: tuple[Hold, ...]
    verifies: tuple[Verify, ...] = ()
    starts: tuple[Start, ...] = ()
    says: tuple[MonitorLines, ...] = ()
    written: ClockReading = ClockReading()
    files: tuple[GuestFile, ...] = ()


def moment() -> ClockReading:
    """Now (native/moment.c)."""
    from memconsole.native import ffi, lib

    now = ffi.new("struct mc_moment *")
    lib.mc_moment(now)
    return ClockReading(now.ticks, now.boottime_ns, now.realtime_ns)


def encode(plan: BootPlan) -> bytes:
    """The bytes of a plan, without what pads them to where the rest of the manifest begins (:func:`end`).

    Raises:
        UsageError: a text is empty, too long or holds a NUL, or a number is out of range.
    """
    records = [
        *(_record(_HOLD, _encode_hold(hold)) for hold in plan.holds),
        *(_record(_VERIFY, _encode_verify(verify)) for verify in plan.verifies),
        *(_record(_START, _encode_start(start)) for start in plan.starts),
        *(_record(_SAY, _encode_say(say)) for say in plan.says),
        *(_record(_FILE, _encode_file(file)) for file in plan.files),
    ]
    body = b"".join(records)
    length = _HEADER.size + len(body)
    moments = (plan.written.ticks, plan.written.boottime_ns, plan.written.realtime_ns)
    raw = bytearray(_HEADER.pack(_MAGIC, VERSION, 0, length, len(records), *moments) + body)
    struct.pack_into("<I", raw, _CRC_AT, zlib.crc32(raw))
    return bytes(raw)


def end(manifest: bytes) -> int:
    """Where the manifest's second part begins: the plan's length, in whole pages.

    Raises:
        BadFile: it does not begin with a plan.
    """
    length = _header(manifest)[3]
    return -(-length // PAGE) * PAGE


def decode(manifest: bytes) -> BootPlan:
    """The plan at the start of a manifest.

    Raises:
        BadFile: it is broken, or of another version.
    """
    _, version, crc, length, count, *moments = _header(manifest)
    if version != VERSION:
        raise _bad(f"it is of version {version}", "use the memconsole that wrote it")
    raw = bytearray(manifest[:length])
    if len(raw) < max(length, _HEADER.size):
        raise _bad("it is truncated")
    struct.pack_into("<I", raw, _CRC_AT, 0)
    if zlib.crc32(raw) != crc:
        raise _bad("its checksum does not match")
    found: dict[int, list[Any]] = {kind: [] for kind in _READERS}
    at = _HEADER.size
    for _ in range(count):
        if at + _HEAD.size > length:
            raise _bad("it has fewer records than its header says")
        magic, record_crc, size, kind, zero = _HEAD.unpack_from(raw, at)
        body = bytes(raw[at + _HEAD.size : at + size])
        whole = magic == _RECORD and _HEAD.size <= size <= _RECORD_MAX and at + size <= length and not zero
        if not whole or zlib.crc32(raw[at + 8 : at + size]) != record_crc:
            raise _bad("it has a record that is not whole")
        if kind in found:
            found[kind].append(_READERS[kind](_Cursor(body)))
        at += (size + 7) & ~7
    holds, verifies, starts, says, files = (tuple(found[kind]) for kind in (_HOLD, _VERIFY, _START, _SAY, _FILE))
    return BootPlan(holds, verifies, starts, says, ClockReading(*moments), files)


def _header(manifest: bytes) -> tuple[bytes, int, int, int, int, int, int, int]:
    if len(manifest) < _HEADER.size or manifest[:8] != _MAGIC:
        raise _bad("it does not begin as a boot plan")
    magic, version, crc, length, count, ticks, boottime, realtime = _HEADER.unpack_from(manifest)
    return magic, version, crc, length, count, ticks, boottime, realtime


def _bad(
    why: str, remedy: str = "resume guests one by one with memconsole guest resume NAME: all it names is in custody"
) -> BadFile:
    return BadFile("the boot plan cannot be read", why, remedy)


def _record(kind: int, body: bytes) -> bytes:
    size = _HEAD.size + len(body)
    if size > _RECORD_MAX:
        raise UsageError("a record of the boot plan is too long", f"{size} bytes where {_RECORD_MAX} may be")
    rest = struct.pack("<IHH", size, kind, 0) + body
    return _RECORD + struct.pack("<I", zlib.crc32(rest)) + rest + bytes(-size % 8)


def _text(text: str, least: int = 1, most: int = _TEXT_MAX) -> bytes:
    raw = os.fsencode(text)
    if not least <= len(raw) <= most or b"\0" in raw:
        raise UsageError(f"{text[:80]!r} cannot stand in a boot plan", f"{least} to {most} bytes, none of them NUL")
    return struct.pack("<H", len(raw)) + raw


def _number(form: str, *values: int) -> bytes:
    try:
        return struct.pack(form, *values)
    except struct.error as error:
        raise UsageError(f"{values} cannot stand in a boot plan", str(error)) from None


def _encode_hold(hold: Hold) -> bytes:
    if len(hold.payload) > _PAYLOAD_MAX:
        raise UsageError(f"the payload of {hold.name} is too long", f"{len(hold.payload)} bytes")
    names = _text(hold.session, 1, _SESSION_MAX) + _text(hold.name, 1, _NAME_MAX)
    return _number("<Q", hold.token) + names + struct.pack("<H", len(hold.payload)) + hold.payload


def _encode_verify(verify: Verify) -> bytes:
    digest = bytes.fromhex(verify.digest)
    if len(digest) != 16:
        raise UsageError(f"{verify.digest!r} is no digest of extents", "it has 16 bytes")
    return _number("<Q", verify.size) + digest + _text(verify.name, 1, _NAME_MAX)


def _encode_start(start: Start) -> bytes:
    if not start.words:
        raise UsageError(f"there is no program to start guest {start.guest} with")
    if len(start.fds) > _FDS_MAX or not all(3 <= number <= 1023 for _, number in start.fds):
        raise UsageError(f"guest {start.guest} cannot be given its fds", f"at most {_FDS_MAX}, their numbers 3 to 1023")
    head = _number("<IIHH", start.uid, start.gid, len(start.fds), len(start.words))
    names = _text(start.guest, 1, _NAME_MAX) + _text(start.directory) + _text(start.log)
    fds = b"".join(_number("<I", number) + _text(name, 1, _NAME_MAX) for name, number in start.fds)
    raw = head + names + fds + b"".join(_text(word, 0) for word in start.words)
    return raw if start.is_plain else raw + _encode_more(start)


def _encode_more(start: Start) -> bytes:
    lists = (start.variables, start.directories, start.unless)
    head = _number("<HHHH", len(start.groups), *map(len, lists))
    groups = b"".join(_number("<I", gid) for gid in start.groups)
    return head + groups + b"".join(_text(each) for texts in lists for each in texts)


def _encode_file(file: GuestFile) -> bytes:
    numbers = (file.uid, file.gid, file.mode, file.early, len(file.content))
    return _number("<IIHHI", *numbers) + _text(file.guest, 1, _NAME_MAX) + _text(file.path) + file.content


def _encode_say(say: MonitorLines) -> bytes:
    head = _number("<IHH", say.within_ms, len(say.lines), 0) + _text(say.guest, 1, _NAME_MAX) + _text(say.socket)
    return head + b"".join(_text(line) + _text(until) for line, until in say.lines)


class _Cursor:
    """The body of a record; takes from its start."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._at = 0

    def take(self, count: int) -> bytes:
        found = self._raw[self._at : self._at + count]
        if len(found) != count:
            raise _bad("a record is shorter than it says")
        self._at += count
        return found

    @property
    def ends(self) -> bool:
        """Whether nothing is left."""
        return self._at == len(self._raw)

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def raw(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        return os.fsdecode(self.raw())


def _decode_hold(cursor: _Cursor) -> Hold:
    token = cursor.number(8)
    return Hold(cursor.text(), token, cursor.text(), cursor.raw())


def _decode_verify(cursor: _Cursor) -> Verify:
    size, digest = cursor.number(8), cursor.take(16).hex()
    return Verify(cursor.text(), size, digest)


def _decode_start(cursor: _Cursor) -> Start:
    uid, gid, fds, words = cursor.number(4), cursor.number(4), cursor.number(2), cursor.number(2)
    guest, directory, log = cursor.text(), cursor.text(), cursor.text()
    numbers = [(cursor.number(4), cursor.text()) for _ in range(fds)]
    given = tuple((name, number) for number, name in numbers)
    said = _texts(cursor, words)
    if cursor.ends:
        return Start(guest, said, directory, log, given, uid, gid)
    groups, *lists = (cursor.number(2) for _ in range(4))
    gids = tuple(cursor.number(4) for _ in range(groups))
    more = [_texts(cursor, each) for each in lists]
    return Start(guest, said, directory, log, given, uid, gid, gids, *more)


def _decode_file(cursor: _Cursor) -> GuestFile:
    uid, gid, mode, early, length = (cursor.number(size) for size in (4, 4, 2, 2, 4))
    guest, path = cursor.text(), cursor.text()
    return GuestFile(guest, path, cursor.take(length), mode, uid, gid, bool(early))


def _decode_say(cursor: _Cursor) -> MonitorLines:
    within, lines, _ = cursor.number(4), cursor.number(2), cursor.number(2)
    guest, socket = cursor.text(), cursor.text()
    return MonitorLines(guest, socket, tuple((cursor.text(), cursor.text()) for _ in range(lines)), within)


def _texts(cursor: _Cursor, count: int) -> tuple[str, ...]:
    return tuple(cursor.text() for _ in range(count))


_READERS = {_HOLD: _decode_hold, _VERIFY: _decode_verify, _START: _decode_start, _SAY: _decode_say, _FILE: _decode_file}


class ResumePhase(Value, frozen=True):
    """A phase of the resume, and when it ended."""

    name: str
    at: ClockReading


class Resumed(Value, frozen=True):
    """What became of a guest: ``state`` is ``started``, ``resumed`` (its monitor said so) or ``held`` (``why``).

    ``told``: that it is to go on, and so what it was started from is behind it, whatever its state is.
    """

    guest: str
    state: str
    pid: int = 0
    start_ticks: int = 0
    why: str = ""
    at: ClockReading = ClockReading()
    told: bool = False


class Mismatch(Value, frozen=True):
    """A difference between the plan and what is: ``id`` names the kind, ``subject`` the thing."""

    id: str
    subject: str
    text: str


class Resume(Value, frozen=True):
    """What ``memconsole-resume`` did, as it wrote it into the memfd ``resume`` in custody."""

    version: int
    mode: str
    phases: tuple[ResumePhase, ...]
    guests: tuple[Resumed, ...]
    held: tuple[str, ...]
    findings: tuple[Mismatch, ...]


def read_resume(raw: bytes) -> Resume:
    """The record of a resume.

    Raises:
        BadFile: it is broken, or of another version.
    """
    from memconsole import decoding

    found = decoding.json(raw.rstrip(b"\0"), Resume, what="the record of the resume")
    if found.version != RESUME_VERSION:
        what = "the record of the resume cannot be read"
        raise BadFile(what, f"it is of version {found.version}", "use the memconsole whose memconsole-resume wrote it")
    return found


def between(start: ClockReading, stop: ClockReading, kernels: Iterable[tuple[ClockReading, ClockReading]]) -> int:
    """Nanoseconds from one moment to another, over a kexec or not.

    ``kernels`` has pairs of moments of one kernel each, which tell how fast the processor's counter goes: the pair
    furthest apart counts. By the real-time clock, to a second, where none tells (see ``native/clock.h``).
    """
    pairs = [(old, new) for old, new in kernels if new.ticks > old.ticks and new.boottime_ns > old.boottime_ns]
    if not start.ticks or stop.ticks < start.ticks or not pairs:
        return max(0, stop.realtime_ns - start.realtime_ns)
    old, new = max(pairs, key=lambda pair: pair[1].boottime_ns - pair[0].boottime_ns)
    return (stop.ticks - start.ticks) * (new.boottime_ns - old.boottime_ns) // (new.ticks - old.ticks)
