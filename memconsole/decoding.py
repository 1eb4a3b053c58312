r"""The one way in for bytes that this process did not write: JSON, TOML, XML, text and deflate streams, each bounded.

Whatever the bytes are, what comes out is a value of the kind that was asked for or an :class:`Undecodable`; no other
exception leaves a decoder of this module. The bounds:

========== =============================================================================================
nesting    ``DEPTH`` levels of arrays and objects (the interpreter's own limit is met while values are compared)
size       ``limit`` bytes: ``DOCUMENT``, or ``SETTINGS`` for what a person writes, where the caller names no other
inflation  ``limit`` bytes out of each step of a deflate stream, whatever the step's input says
text       UTF-8; :func:`text` shows what is none as ``\xNN``, so that JSON can carry it
========== =============================================================================================
"""

from __future__ import annotations

import contextlib
import os
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import msgspec

from memconsole.errors import BadFile

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

DEPTH = 64
"""Levels of nesting; a Snapshot, the deepest value there is, has fewer than ten."""

DOCUMENT = 256 << 20
"""The most bytes of a JSON document: a Snapshot takes about a kilobyte a region, guest or device."""

SETTINGS = 1 << 20
"""The most bytes of a file that a person writes (a macro, the console's settings)."""

T = TypeVar("T")
Fault = Literal["truncated", "malformed", "unfit", "too deep", "too large"]


_FOREIGN = (ValueError, OverflowError, TypeError, LookupError, AttributeError)
"""What comes of values that are not as expected; ``msgspec.DecodeError`` and ``UnicodeDecodeError`` are ValueErrors."""


class Undecodable(BadFile):
    """Bytes that are not what they should be; ``fault`` says in which way, ``why`` in words.

    ``unfit``: well-formed, and another value than the one that was asked for.
    """

    def __init__(self, what: str, why: str, remedy: str = "", *, fault: Fault) -> None:
        super().__init__(f"{what} cannot be read", why, remedy)
        self.fault: Fault = fault


@contextlib.contextmanager
def named(what: str, remedy: str) -> Iterator[None]:
    """A context that makes one error of every exception that reading foreign values may raise.

    Raises:
        Undecodable: its body raised one.
    """
    try:
        yield
    except msgspec.ValidationError as error:
        raise Undecodable(what, str(error), remedy, fault="unfit") from None
    except RecursionError:
        raise Undecodable(what, "its values are nested too deeply", remedy, fault="too deep") from None
    except MemoryError:
        raise Undecodable(what, "there is no memory for it", remedy, fault="too large") from None
    except _FOREIGN as error:
        fault: Fault = "truncated" if "truncated" in str(error) else "malformed"
        raise Undecodable(what, str(error), remedy, fault=fault) from None


def _bounded(size: int, limit: int, what: str, remedy: str) -> None:
    if size > limit:
        raise Undecodable(what, f"it is larger than {limit} bytes", remedy, fault="too large")


def _shallow(value: Any, what: str, remedy: str) -> None:
    """Refuse plain values nested deeper than DEPTH, level by level: nothing here is recursive."""
    level = [value]
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return
        level = below
    raise Undecodable(what, f"its values are nested deeper than {DEPTH} levels", remedy, fault="too deep")


@overload
def json(raw: bytes | bytearray | msgspec.Raw, *, what: str, remedy: str = "", limit: int = DOCUMENT) -> Any: ...
@overload
def json(
    raw: bytes | bytearray | msgspec.Raw, kind: type[T], *, what: str, remedy: str = "", limit: int = DOCUMENT
) -> T: ...
def json(
    raw: bytes | bytearray | msgspec.Raw, kind: Any = Any, *, what: str, remedy: str = "", limit: int = DOCUMENT
) -> Any:
    """The value of a JSON document, of type ``kind`` or of plain values; ``what`` names it in the error.

    Raises:
        Undecodable: it is no JSON, does not fit, or exceeds a bound.
    """
    _bounded(len(memoryview(raw)), limit, what, remedy)
    with named(what, remedy):
        value = msgspec.json.decode(raw, type=kind)
    if kind is Any:
        _shallow(value, what, remedy)
    return value


@overload
def convert(value: Any, kind: type[T], *, what: str, remedy: str = "") -> T: ...
@overload
def convert(value: Any, kind: Any, *, what: str, remedy: str = "") -> Any: ...
def convert(value: Any, kind: Any, *, what: str, remedy: str = "") -> Any:
    """A value of type ``kind`` from plain values that were decoded before.

    Raises:
        Undecodable: it does not fit.
    """
    with named(what, remedy):
        return msgspec.convert(value, type=kind)


def toml(raw: bytes | str, *, what: str, remedy: str = "", limit: int = SETTINGS) -> dict[str, Any]:
    """The table of a TOML document.

    Raises:
        Undecodable: it is no TOML, or exceeds a bound.
    """
    _bounded(len(raw), limit, what, remedy)
    with named(what, remedy):
        value = tomllib.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    _shallow(value, what, remedy)
    return value


def xml(raw: bytes, *, what: str, remedy: str = "", limit: int = SETTINGS) -> Element:
    """The root element of an XML document without a document type: entities of its own could grow without a bound.

    Raises:
        Undecodable: it is no XML, has a document type, or exceeds a bound.
    """
    _bounded(len(raw), limit, what, remedy)
    if b"<!DOCTYPE" in raw:
        raise Undecodable(what, "it has a document type", remedy, fault="malformed")
    from xml.etree import ElementTree

    with named(what, remedy):
        try:
            return ElementTree.fromstring(raw)  # noqa: S314 - see above
        except ElementTree.ParseError as error:
            raise Undecodable(what, str(error), remedy, fault="malformed") from None


def text(raw: bytes) -> str:
    r"""Bytes as text that JSON can carry; what is no UTF-8 is shown as ``\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def contents(path: str | os.PathLike[str], *, limit: int = DOCUMENT, remedy: str = "check the name") -> bytes:
    """The whole of a file, which may be a pipe.

    Raises:
        BadFile: it cannot be read. Undecodable: it is larger than ``limit``.
    """
    with _reading(path, remedy):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _drain(fd, str(path), limit, remedy)
        finally:
            os.close(fd)


@contextlib.contextmanager
def sought(path: str | os.PathLike[str], *, limit: int = DOCUMENT, remedy: str = "check the name") -> Iterator[Path]:
    """A path under which a file can be read at any place and more than once, while the context lasts.

    It is the file's own, or, of a pipe or a terminal, that of a copy in memory.

    Raises:
        BadFile: it cannot be read. Undecodable: what cannot be sought in is larger than ``limit``.
    """
    copy = -1
    with _reading(path, remedy):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _seekable(fd):
                copy = _copied(_drain(fd, str(path), limit, remedy))
        finally:
            os.close(fd)
    if copy < 0:
        yield Path(path)
        return
    try:
        yield Path(f"/proc/self/fd/{copy}")
    finally:
        os.close(copy)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadFile(f"{os.fspath(path)} cannot be read", error.strerror or str(error), remedy) from error
    except ValueError as error:  # a NUL in its name
        raise BadFile(f"{os.fspath(path)!r} cannot be read", str(error), remedy) from error


def _drain(fd: int, what: str, limit: int, remedy: str) -> bytes:
    chunks: list[bytes] = []
    total = 0
    while chunk := os.read(fd, min(1 << 20, limit + 1 - total)):
        chunks.append(chunk)
        total += len(chunk)
        _bounded(total, limit, what, remedy)
    return b"".join(chunks)


def _seekable(fd: int) -> bool:
    try:
        os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return False
    return True


def _copied(content: bytes) -> int:
    fd = os.memfd_create("memconsole-copy", os.MFD_CLOEXEC)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError:
        os.close(fd)
        raise
    return fd


GZIP = 31
"""The ``wbits`` of a stream that gzip wrote."""


def inflated(raw: bytes, *, what: str, dictionary: bytes = b"", remedy: str = "", limit: int = DOCUMENT) -> bytes:
    """What a whole zlib stream inflates to; its checksums, that of the dictionary too, are checked.

    Raises:
        Undecodable: it is no such stream, is cut off, or inflates to more than the limit.
    """
    stream = zlib.decompressobj(zdict=dictionary)
    content = _decompressed(stream, raw, limit, what, remedy)
    if not stream.eof:
        raise Undecodable(what, "it is cut off", remedy, fault="truncated")
    return content


def _decompressed(stream: Any, raw: bytes, limit: int, what: str, remedy: str) -> bytes:
    try:
        content: bytes = stream.decompress(raw, limit)
    except (zlib.error, MemoryError) as error:
        raise Undecodable(what, str(error) or "there is no memory for it", remedy, fault="malformed") from None
    if stream.unconsumed_tail:
        raise Undecodable(what, f"it inflates to more than {limit} bytes", remedy, fault="too large")
    return content


class Inflater:
    """A deflate stream, read piece by piece; ``wbits`` as zlib has it (raw: ``-zlib.MAX_WBITS``)."""

    def __init__(self, wbits: int = -zlib.MAX_WBITS, *, limit: int = DOCUMENT) -> None:
        self._stream = zlib.decompressobj(wbits)
        self._limit = limit

    def inflate(self, raw: bytes, *, what: str, remedy: str = "") -> bytes:
        """What the next piece of the stream inflates to.

        Raises:
            Undecodable: it is no such stream, or it inflates to more than the limit; no other call may follow.
        """
        return _decompressed(self._stream, raw, self._limit, what, remedy)
