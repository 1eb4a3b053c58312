"""Files below a root: how they are read, and what is raised when they are not.

NotFound        the kernel has no such source
Denied          it has, and does not show it to this user
Gone            the process it was about has ended
KernelRefused   any other errno
BadFile         it was read, and is not what the kernel writes
Silent          the process it is about has its memory map locked (:mod:`.patient`)
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from memconsole import decoding
from memconsole.backend.kernel import patient
from memconsole.errors import BadFile, Denied, Gone, KernelRefused, MemconsoleError, NotFound, Silent
from memconsole.model import Unread

Root = Path | str
T = TypeVar("T")

UNREADABLE = (NotFound, Denied, Gone, KernelRefused, BadFile, Silent)
"""All that a reader raises; a survey catches this and goes on with a Gap."""

text = decoding.text
"""See :func:`memconsole.decoding.text`."""

_CHUNK = 1 << 16
_LOCKED = re.compile(r"/proc/(\d+)/(?:task/\d+/)?(?:maps|smaps|smaps_rollup|cmdline|environ|numa_maps)")
"""Files of a process for which the kernel takes the lock of its memory map."""
_MOST_CPUS = 1 << 16
_AS_ROOT = "run as root (CAP_SYS_ADMIN)"
_LOCKDOWN = "/sys/kernel/security/lockdown"
UNLOCKED = "boot without lockdown= and without Secure Boot"
"""The remedy for what a kernel that is locked down forbids, root too."""


def below(root: Root, path: str) -> str:
    """Where ``path`` (absolute) stands below ``root``."""
    base = str(root).rstrip("/")
    return f"{base}{path}"


def live(root: Root) -> bool:
    """Whether ``root`` is this host itself, where system calls may complete what files say."""
    return str(root) == "/"


def gap(source: str, error: MemconsoleError) -> Unread:
    """The Gap a Snapshot carries instead of what ``source`` would have said; a file below it is named."""
    why = f"{error.what}: {error.why}" if error.why and f"{source}/" in error.what else error.why or error.what
    return Unread(source, why, error.remedy)


def failure(source: str, error: OSError) -> MemconsoleError:
    """The named error for an errno met while reading ``source`` (a path as the host itself has it)."""
    number = error.errno or errno.EIO
    if number == errno.EPERM and not os.geteuid() and not _of_process(source) and (level := lockdown()):
        return Denied(f"{source} is not shown", f"the kernel is locked down ({level})", UNLOCKED)
    if number in {errno.EACCES, errno.EPERM}:
        return Denied(f"{source} is not shown to this user", os.strerror(number), _AS_ROOT)
    if number == errno.ESRCH or (number == errno.ENOENT and _of_process(source)):
        return Gone(f"{source} is gone", "the process ended", "look again")
    if number in {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}:
        return NotFound(f"there is no {source}", os.strerror(number))
    return KernelRefused(source, number)


def lockdown(root: Root = "/") -> str:
    """How far a kernel is locked down: ``integrity``, ``confidentiality``, or empty (``none [integrity] ...``)."""
    try:
        words = line(root, _LOCKDOWN).split()
    except UNREADABLE:
        return ""
    return next((word[1:-1] for word in words if word.startswith("[") and word != "[none]"), "")


def malformed(source: str, line: object) -> BadFile:
    """The error for a line of ``source`` that does not follow its grammar."""
    shown = repr(line)
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    return BadFile(f"{source} is not as the kernel writes it", f"cannot read {shown}")


def read(root: Root, path: str, *, limit: int | None = None) -> bytes:
    """The whole of one file.

    Raises:
        NotFound, Denied, Gone, KernelRefused: as :func:`failure` says.
        BadFile: it is larger than ``limit`` bytes. Silent: the process has its memory map locked.
    """
    if live(root) and (match := _LOCKED.fullmatch(path)):
        return patient.call(int(match[1]), lambda _: _read(root, path, limit))
    return _read(root, path, limit)


def _read(root: Root, path: str, limit: int | None) -> bytes:
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


def each(root: Root, path: str, reader: Callable[[str], T], gaps: list[Unread] | None = None) -> list[T]:
    """What ``reader`` makes of each name in a directory; an entry that goes before it is read is left out.

    One that cannot be read costs itself alone, and becomes one of ``gaps``; without ``gaps`` it is raised.

    Raises:
        NotFound, Denied, Gone, KernelRefused: the directory cannot be listed. Without ``gaps`` also as the reader.
    """
    found = []
    for name in names(root, path):
        try:
            found.append(reader(name))
        except (NotFound, Gone):
            continue
        except UNREADABLE as error:
            if gaps is None:
                raise
            gaps.append(gap(f"{path}/{name}", error))
    return found


def exists(root: Root, path: str) -> bool:
    """Whether there is such a file; one that may not be looked for is taken as absent."""
    return os.path.lexists(below(root, path))


def modified(root: Root, path: str) -> int:
    """When a file was last written to, in ns since the epoch; 0 where it is not there, or may not be looked at."""
    try:
        return os.stat(below(root, path)).st_mtime_ns
    except OSError:
        return 0


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
    """How many CPUs a kernel list such as ``0-3,8`` names; raises as :func:`cpu_numbers`."""
    return len(cpu_numbers(text_list))


def cpu_numbers(text_list: str) -> frozenset[int]:
    """The CPUs that a kernel list such as ``0-3,8`` names.

    Raises:
        BadFile: it is no such list, or one of more CPUs than a kernel has.
    """
    found: set[int] = set()
    for part in filter(None, text_list.strip().split(",")):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError as error:
            raise malformed("a list of CPUs", text_list) from error
        if not 0 <= low <= high < _MOST_CPUS:
            raise malformed("a list of CPUs", text_list)
        found.update(range(low, high + 1))
    return frozenset(found)


def of_process(pid: int, task: int | None = None) -> str:
    """Where the files of a process are, or those of one of its threads."""
    return f"/proc/{pid}" if task in {None, pid} else f"/proc/{pid}/task/{task}"


def _of_process(source: str) -> bool:
    return source.startswith("/proc/") and source[6:7].isdecimal()
