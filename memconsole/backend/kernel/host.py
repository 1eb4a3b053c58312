"""The machine: names from /proc/sys/kernel, boot_id, uptime, CPUs, and how it was built."""

from __future__ import annotations

import mmap
import struct

from memconsole import __version__, decoding
from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound
from memconsole.model import Host

_AT_PAGESZ = 6
_LARGEST_CONFIG = 16 << 20


def host(root: Root = "/") -> Host:
    """The machine a tree was taken on; ``uptime_s`` in seconds, ``page_size`` in bytes.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: a source cannot be read.
    """
    uptime = tree.line(root, "/proc/uptime")
    try:
        seconds = float(uptime.split()[0])
    except (ValueError, IndexError) as error:
        raise tree.malformed("/proc/uptime", uptime) from error
    return Host(
        name=tree.line(root, "/proc/sys/kernel/hostname"),
        kernel=tree.line(root, "/proc/sys/kernel/osrelease"),
        arch=tree.line(root, "/proc/sys/kernel/arch"),
        boot_id=tree.line(root, "/proc/sys/kernel/random/boot_id"),
        cpus=tree.cpus(tree.line(root, "/sys/devices/system/cpu/online")),
        page_size=page_size(root),
        uptime_s=seconds,
        tool=f"memconsole {__version__}",
    )


def page_size(root: Root = "/") -> int:
    """Bytes of a base page; of another host as AT_PAGESZ in /proc/self/auxv says.

    Raises:
        BadFile: the vector has no page size; otherwise as :func:`tree.read`.
    """
    if tree.live(root):
        return mmap.PAGESIZE  # our own files in /proc are root's where this process may not be dumped
    vector = tree.read(root, "/proc/self/auxv")
    for key, value in struct.iter_unpack("=QQ", vector[: len(vector) // 16 * 16]):
        if key == _AT_PAGESZ and value:
            return int(value)
    raise tree.malformed("/proc/self/auxv", vector[:32])


def config(root: Root = "/") -> dict[str, str] | None:
    """The kernel's build configuration, ``{"CONFIG_KEXEC_FILE": "y"}``; None where this host does not show it.

    From /proc/config.gz, else /boot/config-RELEASE. An option that is not in it is not built.
    """
    try:
        packed = tree.read(root, "/proc/config.gz")
        raw = decoding.Inflater(decoding.GZIP, limit=_LARGEST_CONFIG).inflate(packed, what="/proc/config.gz")
    except NotFound:
        try:
            raw = tree.read(root, f"/boot/config-{tree.line(root, '/proc/sys/kernel/osrelease')}")
        except NotFound:
            return None
    pairs = (row.split("=", 1) for row in tree.text(raw).splitlines() if row.startswith("CONFIG_") and "=" in row)
    return {key: value.strip('"') for key, value in pairs}
