"""The manifest: all that must be known on the other side of a jump, preserved with the memory it describes.

    manifest  = boot plan (bootplan.py), zeros to the next page  head  JSON
    head      = "MCMANIFS" u32 version  u32 crc  u64 length       little-endian; crc32 of the JSON, whose length it is

The boot plan is what the early path reads; the JSON is a :class:`Manifest`. A memconsole that does not know the
version still has everything: the plan's holds bring it into custody, and the ledger says what it is.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Literal

import msgspec

from memconsole import decoding
from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, ClockReading
from memconsole.backend.ledger.state import WindowGrant
from memconsole.errors import BadFile, KernelRefused
from memconsole.model import Grant, Guest, HandoffReport, Region, Value
from memconsole.units import PAGE

FORMAT: Literal["memconsole.manifest"] = "memconsole.manifest"
VERSION = 1
"""Raised when an older memconsole would misunderstand the JSON. Not for a new field with a default, which it passes
over: a manifest is never rewritten."""
_MAGIC = b"MCMANIFS"
_HEAD = struct.Struct("<8sIIQ")
_LARGEST = 256 << 20


class PreservedRegion(Value, frozen=True):
    """A region as it is carried: its session, and of each segment its token, placement and, if asked for, contents.

    ``digests`` are of the placement (:meth:`ExtentTable.digest`), ``contents`` xxh3-128.
    """

    region: Region
    session: str
    tokens: tuple[int, ...]
    digests: tuple[str, ...]
    runs: int
    preserve_ns: int = 0
    contents: tuple[str, ...] = ()


class SavedGuest(Value, frozen=True):
    """A guest as it is carried: who it is, what its state is called in custody, and when it stood still.

    ``waits``: it ran, and is to stay paused until the next control process has compared what it must be sure of.
    ``stood_ns``: for how long it stood still before that, by its QEMU's own count.
    """

    guest: Guest
    state: str
    at: ClockReading
    waits: bool = False
    stood_ns: int = 0


class PreservedDevice(Value, frozen=True):
    """A device as it is carried: what its IOVA table is called in custody, who said it, its pages and runs.

    ``source``: ``kernel`` or ``ledger``; ``preserved``: by the kernel, or ``why`` it has to be rebuilt;
    ``quiesced_ns``: since the handoff began.
    """

    bdf: str
    guest: str
    table: str
    source: str
    pages: int
    runs: int
    preserved: bool
    why: str
    quiesced_ns: int | None = None


class Manifest(Value, frozen=True, kw_only=True):
    """What is handed over, and how it came to be; ``report`` has the phases until it was written."""

    format: Literal["memconsole.manifest"] = FORMAT
    version: int = VERSION
    tool: str
    kernel: str
    boot_id: str
    command_line: str
    number: int
    began: ClockReading
    written: ClockReading
    regions: tuple[PreservedRegion, ...]
    guests: tuple[SavedGuest, ...]
    grants: tuple[Grant, ...]
    windows: tuple[WindowGrant, ...]
    devices: tuple[PreservedDevice, ...] = ()
    report: HandoffReport


def write(plan: BootPlan, manifest: Manifest) -> int:
    """A new memfd of both parts, which the caller closes.

    Raises:
        UsageError: the plan cannot be written. KernelRefused: there is no memory for it.
    """
    raw = bootplan.encode(plan)
    text = msgspec.json.encode(manifest)
    head = _HEAD.pack(_MAGIC, manifest.version, zlib.crc32(text), len(text))
    return memfd("memconsole-manifest", raw + bytes(-len(raw) % PAGE) + head + text)


def memfd(name: str, content: bytes) -> int:
    """A new memfd with this content, as large as whole pages of it, which the caller closes.

    Raises:
        KernelRefused: there is no memory for it.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, max(PAGE, -(-len(content) // PAGE) * PAGE))
        view = memoryview(content)
        while view:
            view = view[os.pwrite(fd, view, len(content) - len(view)) :]
    except OSError as error:
        os.close(fd)
        raise KernelRefused("memfd_create", error.errno or 0, what=f"{name} cannot be written") from None
    return fd


def content(fd: int) -> bytes:
    """All that a memfd holds, from its start."""
    size = min(os.fstat(fd).st_size, _LARGEST)
    parts = []
    at = 0
    while at < size and (part := os.pread(fd, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def read(raw: bytes) -> Manifest:
    """The second part of a manifest.

    Raises:
        BadFile: it is broken, or of a version this memconsole does not know.
    """
    at = bootplan.end(raw)
    if len(raw) < at + _HEAD.size:
        raise _bad("it ends before its second part")
    magic, version, crc, length = _HEAD.unpack_from(raw, at)
    text = raw[at + _HEAD.size : at + _HEAD.size + length]
    if magic != _MAGIC:
        raise _bad("its second part does not begin as a manifest")
    if version != VERSION:
        raise _bad(f"it is of version {version}, this memconsole knows {VERSION}")
    if len(text) != length or zlib.crc32(text) != crc:
        raise _bad("its checksum does not match")
    try:
        return decoding.json(text, Manifest, what="the manifest")
    except decoding.Undecodable as error:
        raise _bad(error.why) from error


def _bad(why: str) -> BadFile:
    return BadFile(
        "the manifest cannot be read",
        why,
        "regions and guests are in custody all the same: use the memconsole that wrote it to see the rest",
        code="ManifestUnknown",
    )
