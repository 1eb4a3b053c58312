"""Files below a root: how they are read, and what is raised when they are not.

NotFound        the kernel has no such source
Denied          it has, and does not show it to this user
Gone            the process it was about has ended
KernelRefused   any other errno
BadFile         it was read, and is not what the kernel writes
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from memconsole.errors import BadFile, Denied, Gone, KernelRefused, MemconsoleError, NotFound
from memconsole.model import Gap

Root = Path | str

UNREADABLE = (NotFound, Denied, Gone, KernelRefused, BadFile)
"""All that a reader raises; a survey catches this and goes on with a Gap."""

_CHUNK = 1 << 16
_AS_ROOT = "run as root (CAP_SYS_ADMIN)"


def below(root: Root, path: str) -> str:
    """Where ``path`` (absolute) stands below ``root``."""
    base = str(root).rstrip("/")
    return f"{base}{path}"


def live(root: Root) -> bool:
    """Whether ``root`` is this host itself, where system calls may complete what files say."""
    return str(root) == "/"


def gap(source: str, error: MemconsoleError) -> Gap:
    """The Gap a Snapshot carries instead of what ``source`` would have said."""
    return Gap(source, error.why or error.what, error.remedy)


def failure(source: str, error: OSError) -> MemconsoleError:
    """The named error for an errno met while reading ``source`` (a path as the host itself has it)."""
    number = error.errno or errno.EIO
    if number in {errno.EACCES, errno.EPERM}:
        return Denied(f"{source} is not shown to this user", os.strerror(number), _AS_ROOT)
    if number == errno.ESRCH or (number == errno.ENOENT and _of_process(source)):
        return Gone(f"{source} is gone", "the process ended")
    if number in {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}:
        return NotFound(f"there is no {source}", os.strerror(number))
    return KernelRefused(source, number)


def malformed(source: str, line: object) -> BadFile:
    """The error for a line of ``source`` that does not follow its grammar."""
    shown = repr(line)
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    return BadFile(f"{source} is not as the kernel writes it", f"cannot read {shown}")


def read(root: Root, path: str, *, limit: int | None = None) -> bytes:
    """The whole of one file.

    Raises:
        NotFound, Denied, Gone, KernelRefused: as :func:`failure` says.
        BadFile: it is larger than ``limit`` bytes.
    """
    try:
        fd = os.open(below(root, path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = [os.read(fd, _CHUNK)]
            total = 0
            while chunks[-1]:
                total += len(chunks[-1])
                if limit is not None and total > limit:
                    raise BadFile(f"{path} is too large", f"more than {limit} bytes")
                chunks.append(os.read(fd, _CHUNK))
        finally:
            os.close(fd)
    except OSError as error:
        raise failure(path, error) from error
    return b"".join(chunks)


def text(raw: bytes) -> str:
    r"""Bytes as text that JSON can carry; what is no UTF-8 is shown as ``\xNN``."""
    return raw.decode("utf-8", "backslashreplace")


def line(root: Root, path: str) -> str:
    """The text of a file of one line, without its end."""
    return text(read(root, path)).strip()


def number(root: Root, path: str, base: int = 0) -> int:
    """The one number in a file; ``base`` 0 reads ``0x`` as hexadecimal.

    Raises:
        BadFile: it is not a number; otherwise as :func:`read`.
    """
    found = line(root, path)
    try:
        return int(found, base)
    except ValueError as error:
        raise malformed(path, found) from error


def names(root: Root, path: str) -> list[str]:
    """The names in a directory, sorted, with numbers in the order of their value.

    Raises:
        NotFound, Denied, Gone, KernelRefused: as :func:`failure` says.
    """
    try:
        found = os.listdir(below(root, path))
    except OSError as error:
        raise failure(path, error) from error
    return sorted(found, key=lambda name: (len(name), name) if name.isdecimal() else (0, name))


def exists(root: Root, path: str) -> bool:
    """Whether there is such a file; one that may not be looked for is taken as absent."""
    return os.path.lexists(below(root, path))


def link(root: Root, path: str) -> str | None:
    """Where a symbolic link points, as it is written; None where there is none."""
    try:
        return os.readlink(below(root, path))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EINVAL, errno.ENOTDIR}:
            return None
        raise failure(path, error) from error


def link_name(root: Root, path: str) -> str | None:
    """The last part of where a symbolic link points (a driver's name, a group's number); None where there is none."""
    target = link(root, path)
    return None if target is None else target.rsplit("/", 1)[-1]


def cpus(text_list: str) -> int:
    """How many CPUs a kernel list such as ``0-3,8`` names.

    Raises:
        BadFile: it is no such list.
    """
    total = 0
    for part in filter(None, text_list.strip().split(",")):
        first, _, last = part.partition("-")
        try:
            total += int(last or first) - int(first) + 1
        except ValueError as error:
            raise malformed("a list of CPUs", text_list) from error
    return total


def _of_process(source: str) -> bool:
    return source.startswith("/proc/") and source[6:7].isdecimal()
