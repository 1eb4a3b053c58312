"""libvirt as it is installed on a host, and its daemons that run; none of its programs is started.

/usr/sbin/{libvirtd,virtqemud}      a daemon that runs QEMUs
/usr/lib*/**/libvirt.so.0.N.P       the library's version: N is 1000 times the major and the minor number
/proc/PID/{comm,stat,ns/mnt}        a daemon that runs: root's, in this mount namespace
/etc/libvirt/hooks/qemu{,.d/*}      hooks: a daemon calls them if there was any when it started
/etc/libvirt/qemu.conf              memory_backing_dir = "DIR"
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from memconsole.backend.kernel import tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import MemconsoleError

DAEMONS = ("libvirtd", "virtqemud")
HOOKS = "/etc/libvirt/hooks"
_PROGRAMS = ("/usr/sbin", "/usr/bin", "/sbin")
_UNITS = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
_LIBRARIES = ("/usr/lib64", "/usr/lib")
ACKS = (9, 7)
"""The first libvirt after the first QEMU that has ``switchover-ack`` (8.1): no earlier one can know it."""
_LIBRARY = re.compile(r"libvirt\.so\.0\.(\d+)\.(\d+)")


class Daemon(NamedTuple):
    """A daemon that runs: which, its PID, and when it started (seconds since the epoch)."""

    name: str
    pid: int
    since: float

    @property
    def unit(self) -> str:
        """Its unit under systemd."""
        return f"{self.name}.service"


def installed(root: Root = "/") -> tuple[str, ...]:
    """The daemons that are installed."""
    return tuple(name for name in DAEMONS if any(tree.exists(root, f"{place}/{name}") for place in _PROGRAMS))


def with_unit(root: Root = "/") -> tuple[str, ...]:
    """The daemons that systemd has a unit for."""
    return tuple(name for name in DAEMONS if any(tree.exists(root, f"{place}/{name}.service") for place in _UNITS))


def version(root: Root = "/") -> tuple[int, int, int] | None:
    """The version of libvirt's library, the newest where there are several; None where it is not found."""
    found = []
    for base in _LIBRARIES:
        for place in (base, *(f"{base}/{name}" for name in _names(root, base) if name.endswith("-linux-gnu"))):
            for name in _names(root, place):
                if match := _LIBRARY.fullmatch(name):
                    number = int(match[1])
                    found.append((number // 1000, number % 1000, int(match[2])))
    return max(found, default=None)


def knows_no_acks(root: Root = "/") -> bool:
    """Whether libvirt is too old to know QEMU's capability ``switchover-ack``; one that is not found may know it."""
    found = version(root)
    return found is not None and found[:2] < ACKS


def running(root: Root = "/") -> tuple[Daemon, ...]:
    """The system's daemons that run: those of users, and of containers, are none of this host's configuration."""
    own = tree.link(root, "/proc/self/ns/mnt")
    found = []
    for name in _names(root, "/proc"):
        if not name.isdecimal():
            continue
        try:
            comm = tree.line(root, f"/proc/{name}/comm")
            if comm not in DAEMONS or Path(tree.below(root, f"/proc/{name}")).stat().st_uid != _owner(root):
                continue
            if tree.link(root, f"/proc/{name}/ns/mnt") == own:
                found.append(Daemon(comm, int(name), _started(root, name)))
        except (MemconsoleError, OSError):
            continue  # it has ended meanwhile, or is not shown to this user
    return tuple(found)


def sees_hooks(daemon: Daemon, root: Root = "/") -> bool:
    """Whether a hook of QEMU's was there when the daemon started: it looks once, and calls none if there was none."""
    places = [f"{HOOKS}/qemu", *(f"{HOOKS}/qemu.d/{name}" for name in _names(root, f"{HOOKS}/qemu.d"))]
    for place in places:
        path = Path(tree.below(root, place))
        if path.is_file() and os.access(path, os.X_OK) and path.stat().st_ctime <= daemon.since:
            return True
    return False


def _owner(root: Root) -> int:
    """The user whom a process of root's belongs to: in a tree that is not a live host's, whoever made it."""
    return 0 if tree.live(root) else Path(tree.below(root, "/proc")).stat().st_uid


def _names(root: Root, path: str) -> list[str]:
    try:
        return tree.names(root, path)
    except MemconsoleError:
        return []


def _started(root: Root, pid: str) -> float:
    """When a process started, in seconds since the epoch."""
    fields = tree.line(root, f"/proc/{pid}/stat").rpartition(")")[2].split()
    up = float(tree.line(root, "/proc/uptime").split()[0])
    return time.time() - up + int(fields[19]) / os.sysconf("SC_CLK_TCK")
