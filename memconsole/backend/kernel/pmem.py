"""Persistent memory as block devices: what ``memmap=nn!ss``, an NVDIMM or CXL memory becomes.

/sys/class/block/pmemN/{size,dev}       size in sectors of 512 bytes
/sys/class/block/pmemN/device           its namespace: namespaceX.Y, btt, pfn
/sys/bus/nd/devices/namespaceX.Y/       resource (physical start), mode, numa_node
/proc/iomem                             Persistent Memory (legacy): what memmap=nn!ss set aside
"""

from __future__ import annotations

import os
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, NotFound
from memconsole.model import Unread

_BLOCK = "/sys/class/block"
_SECTOR = 512


class Pmem(NamedTuple):
    """A pmem device: ``name`` as in /dev, sizes and addresses in bytes, ``start`` None where it is not shown.

    ``number`` is its st_rdev, ``namespace`` the nd device it stands for; ``node`` -1 where there is none.
    """

    name: str
    size: int
    start: int | None
    namespace: str
    number: int
    node: int = -1

    @property
    def path(self) -> str:
        """Its device file."""
        return f"/dev/{self.name}"


def devices(root: Root = "/", gaps: list[Unread] | None = None) -> tuple[Pmem, ...]:
    """The pmem block devices in order; one that cannot be read is named in ``gaps``, without them it is raised.

    Raises:
        Denied, KernelRefused: they cannot be listed. BadFile, or these: without ``gaps``, one of them cannot be read.
    """
    try:
        names = [name for name in tree.names(root, _BLOCK) if name.startswith("pmem")]
    except NotFound:
        return ()
    found = []
    for name in sorted(names):
        found += _read_each(root, name, gaps)
    return tuple(found)


def _read_each(root: Root, name: str, gaps: list[Unread] | None) -> list[Pmem]:
    try:
        return [_device(root, name)]
    except NotFound:  # it was taken away meanwhile
        return []
    except tree.UNREADABLE as error:
        if gaps is None:
            raise
        gaps.append(tree.gap(f"{_BLOCK}/{name}", error))
        return []


def _device(root: Root, name: str) -> Pmem:
    base = f"{_BLOCK}/{name}"
    number = tree.line(root, f"{base}/dev")
    major, colon, minor = number.partition(":")
    if not (colon and major.isdecimal() and minor.isdecimal()):
        raise tree.malformed(f"{base}/dev", number)
    return Pmem(
        name=name,
        size=tree.number(root, f"{base}/size", 10) * _SECTOR,
        start=_optional(root, f"{base}/device/resource"),
        namespace=tree.link_name(root, f"{base}/device") or "",
        number=os.makedev(int(major), int(minor)),
        node=_optional(root, f"{base}/device/numa_node", 10, -1) or 0,
    )


def _optional(root: Root, path: str, base: int = 0, default: int | None = None) -> int | None:
    """A number that is not there, or is shown to root only."""
    try:
        return tree.number(root, path, base)
    except (NotFound, Denied):
        return default
