r"""What is mounted where in this process's mount namespace, or in another's.

mountinfo = line*
line      = id parent major:minor root path options optional* "-" fstype source superoptions
                                    blanks and backslashes in paths are written as \ooo, octal
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root

_MOUNTINFO = "/proc/self/mountinfo"
_DEVICE = re.compile(r"([0-9]{1,4}):([0-9]{1,7})", re.ASCII)
_ESCAPED = re.compile(r"\\([0-7]{3})")


class MountInfo(NamedTuple):
    """One mount: ``root`` of filesystem ``device`` (st_dev) shown at ``path``; a later one there hides it.

    ``options`` are those of the filesystem (a hierarchy of cgroups has its controllers there), ``id`` is the mount's.
    """

    device: int
    root: str
    path: Path
    fstype: str
    source: str
    options: str = ""
    id: int = 0


def mounts(root: Root = "/") -> list[MountInfo]:
    """Every mount, in the order of the kernel's list.

    Raises:
        BadFile: a line is none.
    """
    return list(parse(tree.read(root, _MOUNTINFO)))


def of_process(root: Root, pid: int) -> list[MountInfo]:
    """Every mount that a process sees; raises as :func:`mounts`, and Gone where it ended."""
    return list(parse(tree.read(root, f"/proc/{pid}/mountinfo")))


def parse(raw: bytes) -> Iterator[MountInfo]:
    """The mounts of a mountinfo file; raises as :func:`mounts`."""
    for line in tree.text(raw).split("\n"):
        if not line:
            continue
        before, dash, after = line.partition(" - ")
        words, ends = before.split(" "), after.split(" ")
        if not dash or len(words) < 6 or len(ends) < 2:
            raise tree.malformed(_MOUNTINFO, line)
        device, top, path = _device(line, words[2]), _plain(words[3]), Path(_plain(words[4]))
        number = int(words[0]) if words[0].isdecimal() and words[0].isascii() else 0
        yield MountInfo(device, top, path, ends[0], _plain(ends[1]), " ".join(ends[2:]), number)


def _device(line: str, numbers: str) -> int:
    found = _DEVICE.fullmatch(numbers)
    if found is None:
        raise tree.malformed(_MOUNTINFO, line)
    return os.makedev(int(found[1]), int(found[2]))


def _plain(word: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), word)
