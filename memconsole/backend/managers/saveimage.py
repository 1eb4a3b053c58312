"""libvirt's save image (``virsh save``, ``managedsave``): a header, the domain's XML, and QEMU's migration stream.

    image  = magic 19*u32 xml NUL [cookie NUL] padding stream          numbers little-endian (the host's)
    magic  = "LibvirtQemudSave" | "LibvirtQemudPart"                   Part: it is being written, and nobody takes it
    u32    = version (2), length of xml to padding, whether the guest ran, format (0: raw), where the cookie begins in
             that length (0: none), 14 of no use

libvirt keeps what it makes of an image apart from what it checks: the XML is compared with nothing, and a stream whose
RAM is not in it would start on whatever RAM there is. So an image of memconsole's is locked twice until the RAM is in
place and verified: its stream says a capability without which QEMU does not take it (:mod:`.migration`), and its XML
names the region and the digest of the RAM's frames (:mod:`.domainxml`). Only :func:`unlock` takes the first one out,
and only for the same digest.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from memconsole import wholefile
from memconsole.backend.managers import domainxml
from memconsole.backend.managers.migration import Elsewhere, Filtered, filtered
from memconsole.errors import BadFile, KernelRefused, Refused

MAGIC = b"LibvirtQemudSave"
PARTIAL = b"LibvirtQemudPart"
_HEADER = struct.Struct("<16s19I")
VERSION = 2
"""libvirt's own, not ours. Raised here when libvirt writes another and this has been read and tried."""
_LARGEST = 16 << 20
_RAW = 0
_FORMATS = {1: "gzip", 2: "bzip2", 3: "xz", 4: "lzop"}
_REMEDY = "save the guest again"


class Image(NamedTuple):
    """What stands before the stream: whether the guest ran, its domain's XML, libvirt's cookie, and the padding."""

    running: bool
    xml: bytes
    cookie: bytes = b""
    padding: int = 0

    @property
    def lock(self) -> domainxml.Lock | None:
        """What it is locked to (:func:`.domainxml.lock`)."""
        return domainxml.lock(self.xml)


def read(fd: int, name: str = "the save image") -> Image:
    """What stands before the stream of an image; the file then stands at the stream.

    Raises:
        BadFile: it is no image, or not whole. Refused: it is of a format that is not read here (compressed, sparse).
    """
    os.lseek(fd, 0, os.SEEK_SET)
    raw = _exactly(fd, _HEADER.size, name)
    magic, version, length, running, form, cookie_at, *_ = _HEADER.unpack(raw)
    if magic == PARTIAL:
        raise BadFile(f"{name} is not whole", "it was never written to its end", _REMEDY)
    if magic != MAGIC:
        raise BadFile(f"{name} is no save image of libvirt", "it does not begin as one", "choose another file")
    if version != VERSION:
        raise BadFile(f"{name} is of version {version}", f"this memconsole knows version {VERSION}", _REMEDY)
    if form != _RAW:
        why = f"its format is {_FORMATS.get(form, f'number {form}')}, not raw"
        raise Refused(f"{name} cannot be used", why, 'set save_image_format = "raw" in qemu.conf', code="SaveFormat")
    if running not in {0, 1} or not 1 < length <= _LARGEST or (cookie_at and not 1 < cookie_at < length):
        raise BadFile(f"{name} is damaged", "its header says what cannot be", _REMEDY)
    return _parts(_exactly(fd, length, name), bool(running), cookie_at, name)


def _parts(raw: bytes, running: bool, cookie_at: int, name: str) -> Image:
    xml, nul, rest = raw.partition(b"\0")
    cookie, padding = b"", len(rest)
    if cookie_at:
        if cookie_at != len(xml) + 1:
            raise BadFile(f"{name} is damaged", "its cookie is not behind its XML", _REMEDY)
        cookie, nul, rest = rest.partition(b"\0")
        padding = len(rest)
    if not nul or rest.strip(b"\0"):
        raise BadFile(f"{name} is damaged", "its XML has no end", _REMEDY)
    domainxml.lock(xml)  # it is a domain's
    return Image(running, xml, cookie, padding)


def _exactly(fd: int, length: int, name: str) -> bytes:
    chunks: list[bytes] = []
    while length:
        try:
            chunk = os.read(fd, length)
        except OSError as error:
            raise KernelRefused("read", error.errno or 0, what=f"{name} cannot be read") from None
        if not chunk:
            raise BadFile(f"{name} is not whole", "it ends before its stream", _REMEDY)
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def begin(fd: int, image: Image) -> None:
    """Write what stands before the stream to the front of an empty file, which no libvirt takes before :func:`finish`.

    The padding is what keeps the length of an image whose XML became longer: there is none where it takes it all.

    Raises:
        Undecodable: its XML is no domain's. KernelRefused: it cannot be written.
    """
    domainxml.lock(image.xml)
    xml, cookie = image.xml + b"\0", image.cookie + b"\0" if image.cookie else b""
    if b"\0" in image.xml or b"\0" in image.cookie or len(xml) + len(cookie) + image.padding > _LARGEST:
        raise BadFile("the save image cannot be written", "its XML is too long, or has a zero byte in it", _REMEDY)
    body = xml + cookie + bytes(image.padding)
    numbers = (VERSION, len(body), image.running, _RAW, len(xml) if cookie else 0, *(0,) * 14)
    with _writing():
        os.lseek(fd, 0, os.SEEK_SET)
        _write(fd, _HEADER.pack(PARTIAL, *numbers) + body)


def finish(fd: int) -> None:
    """The stream is behind it, and all of it on the disk: from now on it is an image.

    Raises:
        KernelRefused: it cannot be written.
    """
    with _writing():
        os.fsync(fd)
        os.pwrite(fd, MAGIC, 0)
        os.fsync(fd)


def _write(fd: int, raw: bytes) -> None:
    rest = memoryview(raw)
    while rest:
        rest = rest[os.write(fd, rest) :]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "make room where images lie"
        raise KernelRefused("write", error.errno or 0, what="a save image cannot be written", remedy=remedy) from None


def lock(source: int, target: int, elsewhere: Sequence[Elsewhere], to: domainxml.Lock) -> Filtered:
    """Write an image anew to an empty file without the RAM that is elsewhere, its RAM in files, locked to that RAM.

    Raises:
        BadFile, Refused: the image, or its stream, is not one that can be. KernelRefused: it cannot be written.
    """
    image = read(source)
    begin(target, image._replace(xml=domainxml.locked(domainxml.on_files(image.xml), to), padding=0))
    found = filtered(source, target, elsewhere, lock=True)
    finish(target)
    return found


def unlock(source: int, target: Path, elsewhere: Sequence[Elsewhere], *, digest: str) -> Filtered:
    """Put a locked image in place as one that QEMU takes; ``digest`` is that of the RAM, as it was verified here.

    The file is root's alone, replaces one that is there, and is whole or not there. Its XML keeps its lock, for
    libvirt's hook. Each block in ``elsewhere`` must be in the image, of this size, and no other may be missing.

    Raises:
        Refused: the image is locked to other RAM (``LockedImage``), or not locked at all. BadFile: it is damaged.
        KernelRefused: it cannot be written.
    """
    image = read(source)
    _refuse_other(image.lock, digest)
    with _writing(), wholefile.written(target, lasting=True) as file:
        begin(file.fileno(), image)
        found = filtered(source, file.fileno(), elsewhere)
        _refuse_unlocked(found)
        finish(file.fileno())
    return found


def _refuse_other(locked: domainxml.Lock | None, digest: str) -> None:
    what = "the save image is not unlocked"
    if locked is None:
        raise Refused(what, "it does not say to which RAM it is locked", "restore it as it is", code="NotLocked")
    if locked.digest != digest:
        why = f"it is locked to the RAM of region {locked.region}, whose frames are not those that are here"
        raise Refused(
            what, why, "keep the image, and see what became of its RAM: memconsole handoff report", code="LockedImage"
        )


def _refuse_unlocked(found: Filtered) -> None:
    if not found.was_locked:
        why = "its stream says no lock: it was unlocked before, or has its RAM in it"
        raise Refused("the save image is not unlocked", why, "restore it as it is", code="NotLocked")


class Description(NamedTuple):
    """An image, and what its stream is: none where it cannot be read, and then why."""

    image: Image
    stream: Filtered | None
    damage: str = ""


def examine(fd: int, name: str = "the save image") -> Description:
    """What an image is, its stream read to the end; RAM that is elsewhere is not asked for.

    Raises:
        BadFile, Refused: as :func:`read`.
    """
    image = read(fd, name)
    try:
        return Description(image, filtered(fd, -1, ()))
    except (BadFile, Refused) as error:
        return Description(image, None, error.why)
