"""The memory limit over this process: the tightest of its cgroup and of those above it.

    /proc/self/cgroup       HIERARCHY ":" [ CONTROLLER { "," CONTROLLER } ] ":" PATH      v2: "0::PATH"
    mountinfo               where hierarchies are mounted; else /sys/fs/cgroup and /sys/fs/cgroup/memory
    v2  memory.max              bytes, or max; only where the controller is on, never in the first cgroup
    v1  memory.limit_in_bytes   bytes; what no memory reaches (2^63 less a page) is none

PATH has colons of its own (``hv@fd00::1.service``). The memory controller is of v1 where a hierarchy names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memconsole.backend.kernel import mounts, tree
from memconsole.backend.kernel.tree import Root
from memconsole.errors import NotFound

_OWN = "/proc/self/cgroup"
_NO_LIMIT = 1 << 62


class Limit(NamedTuple):
    """A limit in bytes, and the cgroup it is of."""

    cgroup: str
    size: int


class _Place(NamedTuple):
    """The cgroup of this process, where its hierarchy is mounted, and what limits are called there."""

    cgroup: str
    mount: str
    file: str


def memory_limit(root: Root = "/") -> Limit | None:
    """The tightest limit; None where there is none.

    Raises:
        NotFound: the cgroups are not where they are said to be, so that a limit may be and is not seen.
        Denied, KernelRefused, BadFile: one of them cannot be read.
    """
    place = _place(root)
    if place is None:
        return None
    found: Limit | None = None
    for cgroup in _upwards(place.cgroup):
        size = _limit(root, f"{place.mount}{cgroup}", place.file)
        if size is not None and (found is None or size < found.size):
            found = Limit(cgroup or "/", size)
    return found


def _limit(root: Root, directory: str, file: str) -> int | None:
    try:
        text = tree.line(root, f"{directory}/{file}")
    except NotFound:
        if not tree.exists(root, directory or "/"):
            raise NotFound(f"there is no {directory}", f"{_OWN} names it", "mount the cgroup hierarchy") from None
        return None  # the controller is not on in this cgroup: those above count
    if text == "max":
        return None
    if not text.isdecimal():
        raise tree.malformed(f"{directory}/{file}", text)
    return int(text) if int(text) < _NO_LIMIT else None


def _upwards(cgroup: str) -> Iterator[str]:
    """A cgroup and all above it, the first one as an empty string."""
    while cgroup.strip("/"):
        yield cgroup
        cgroup = cgroup.rpartition("/")[0]
    yield ""


def _place(root: Root) -> _Place | None:
    """None where this kernel counts no cgroup's memory."""
    try:
        rows = [row.split(":", 2) for row in tree.text(tree.read(root, _OWN)).splitlines()]
    except NotFound:
        return None
    for row in rows:
        if len(row) != 3 or not row[2].startswith("/"):
            raise tree.malformed(_OWN, ":".join(row))
    v1 = next((path for _, controllers, path in rows if "memory" in controllers.split(",")), None)
    v2 = next((path for number, controllers, path in rows if number == "0" and not controllers), None)
    if v1 is not None:
        return _mounted(root, v1, "cgroup", "/sys/fs/cgroup/memory", "memory.limit_in_bytes")
    if v2 is not None:
        return _mounted(root, v2, "cgroup2", "/sys/fs/cgroup", "memory.max")
    return None


def _mounted(root: Root, cgroup: str, fstype: str, usual: str, file: str) -> _Place:
    """A cgroup by its path below where its hierarchy is mounted, of which a mount may show a part only."""
    try:
        known = mounts.mounts(root)
    except NotFound:
        known = []
    for mount in known:
        if mount.fstype != fstype or (fstype == "cgroup" and "memory" not in mount.options.split(",")):
            continue
        top = mount.root.rstrip("/")
        if f"{cgroup}/".startswith(f"{top}/"):
            return _Place(cgroup[len(top) :], str(mount.path), file)
    if known:
        raise NotFound(
            f"cgroup {cgroup} is not mounted", f"no {fstype} in mountinfo shows it", "mount it, or look there"
        )
    return _Place(cgroup, usual, file)
