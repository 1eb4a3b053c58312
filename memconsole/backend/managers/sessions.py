"""Domains of users' session daemons (``qemu:///session``), from files that are those users' to write as they like.

    /run/user/UID/libvirt/qemu/run/NAME.xml     as /run/libvirt/qemu/NAME.xml of the system's (:mod:`.libvirt`)

So they are read as what another user has written: from a directory and files that are the user's own, on the tmpfs
that is his, without following a link or crossing a mount (:mod:`memconsole.backend.kernel.beneath`); regular files of a
bounded size and number; and what one says is a guest's only where a process of the same user bears it out. Such a
domain is called ``NAME@UID``, so that none passes for another user's, or the system's. Whether it is defined stands in
the user's home, which is not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from msgspec.structs import replace

from memconsole.backend.kernel import beneath, census, mounts, tree
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt
from memconsole.backend.managers.libvirt import Domain
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.model import Managed, Unread

USERS = "/run/user"
RUNNING = "libvirt/qemu/run"
"""Below a user's own directory."""
STEPS = (".", "libvirt", "libvirt/qemu", RUNNING)
"""The directories on the way there, each in the one before."""
USERS_MOST = 256
DOMAINS_MOST = 64
"""Domains of one user that are read; of more, a gap says so."""
_ENTRIES_MOST = 1024
LARGEST = 256 << 10
"""Bytes of a status file: one of twenty disks has forty thousand."""
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM})
"""No daemon of this user has run, or this process may not see: then it sees the user's processes no better."""
_NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,250}\.xml")
_MOUNT_ID = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE | re.ASCII)


class _File(NamedTuple):
    root: str
    path: str
    inode: int
    mtime_ns: int
    size: int


_KEPT_MOST = 1024
_kept: OrderedDict[_File, Domain] = OrderedDict()


def domains(root: Root = "/", gaps: list[Unread] | None = None) -> dict[int, Managed]:
    """The domains of users' session daemons, by the PID of a process of that user's; what cannot be read is a gap.

    Raises:
        NotFound: no user is logged in. Denied, KernelRefused: it is not shown.
    """
    found: dict[int, Managed] = {}
    for uid in users(root):
        for domain in _of_user(root, uid, gaps if gaps is not None else []):
            with contextlib.suppress(*tree.UNREADABLE):  # it has ended, or there never was such a process
                if census.uid(root, domain.pid) == uid:
                    found.setdefault(domain.pid, domain.managed)
    return found


def users(root: Root = "/") -> list[int]:
    """The users that have a directory of their own, by UID; raises as :func:`domains`."""
    return [int(name) for name in tree.names(root, USERS) if name.isdecimal() and name.isascii()][:USERS_MOST]


def opened(root: Root, uid: int, below: str = RUNNING) -> int:
    """A descriptor of a directory below the one of a user: of that in which the daemon keeps its status files.

    Raises:
        OSError: there is none, or it is not the user's own.
    """
    with _own(root, uid) as top:
        return _beneath(top, below, os.O_RDONLY | os.O_DIRECTORY, _owner(root, uid))


def _of_user(root: Root, uid: int, gaps: list[Unread]) -> Iterator[Domain]:
    place = f"{USERS}/{uid}/{RUNNING}"
    try:
        fd = opened(root, uid)
    except OSError as error:
        if error.errno not in _ABSENT:
            gaps.append(tree.gap(place, _refused(place, error)))
        return
    try:
        with os.scandir(fd) as entries:
            seen = [each.name for each in islice(entries, _ENTRIES_MOST)]
        names = sorted(name for name in seen if _NAME.fullmatch(name))
        if len(names) > DOMAINS_MOST or len(seen) == _ENTRIES_MOST:
            gaps.append(
                Unread(place, f"more than {DOMAINS_MOST} domains, or {_ENTRIES_MOST} files: the rest is not read")
            )
        for name in names[:DOMAINS_MOST]:
            try:
                yield _one(root, uid, fd, name)
            except FileNotFoundError:
                continue  # the domain has ended meanwhile
            except OSError as error:
                gaps.append(tree.gap(f"{place}/{name}", _refused(f"{place}/{name}", error)))
            except MemconsoleError as error:
                gaps.append(tree.gap(f"{place}/{name}", error))
    finally:
        os.close(fd)


def _one(root: Root, uid: int, directory_fd: int, name: str) -> Domain:
    """A status file, parsed again only after it changed."""
    path = f"{USERS}/{uid}/{RUNNING}/{name}"
    fd = _beneath(directory_fd, name, os.O_RDONLY | os.O_NONBLOCK, _owner(root, uid))
    try:
        status = os.fstat(fd)
        if status.st_size > LARGEST:
            raise BadFile(f"{path} is too large", f"more than {LARGEST} bytes")
        file = _File(str(root), path, status.st_ino, status.st_mtime_ns, status.st_size)
        if file not in _kept:
            raw = os.read(fd, LARGEST + 1)
            pid, managed = libvirt.parse(raw, path, status.st_mtime_ns)
            _kept[file] = Domain(pid, replace(managed, name=f"{managed.name}@{uid}", user=uid))
            while len(_kept) > _KEPT_MOST:
                _kept.popitem(last=False)
        return _kept[file]
    finally:
        os.close(fd)


@contextlib.contextmanager
def _own(root: Root, uid: int) -> Iterator[int]:
    """A user's own directory, for which no process answers: on a tmpfs (in a recorded tree, on that tree's disk)."""
    place = tree.below(root, f"{USERS}/{uid}")
    fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if tree.live(root) and _kind(fd) != "tmpfs":
            raise OSError(errno.EXDEV, "it is not on a tmpfs", place)
        yield fd
    finally:
        os.close(fd)


def _kind(fd: int) -> str:
    """What kind of file system an open directory lies on, by the mount that it was reached through; none is asked."""
    said = _MOUNT_ID.search(tree.text(tree.read("/", f"/proc/self/fdinfo/{fd}")))
    return next((each.fstype for each in mounts.mounts() if said is not None and each.id == int(said[1])), "")


def _beneath(top: int, path: str, flags: int, owner: int) -> int:
    """What is opened is a directory or a regular file, and its owner's.

    Raises:
        OSError: it is not.
    """
    fd = beneath.opened(top, path, flags)
    status = os.fstat(fd)
    wanted = stat.S_ISDIR if flags & os.O_DIRECTORY else stat.S_ISREG
    if status.st_uid != owner or not wanted(status.st_mode):
        os.close(fd)
        raise OSError(errno.EPERM if status.st_uid != owner else errno.EINVAL, "it is not what the daemon makes", path)
    return fd


def _owner(root: Root, uid: int) -> int:
    """Whose files a user's are: in a tree that is not a live host's, whoever's made it."""
    return uid if tree.live(root) else os.stat(tree.below(root, USERS)).st_uid  # noqa: PTH116 - a name, not a path


def _refused(place: str, error: OSError) -> MemconsoleError:
    why = {
        errno.ELOOP: "it is a link, which the daemon makes none of",
        errno.EXDEV: "it is on a file system that another than the kernel may answer for",
        errno.EPERM: "it does not belong to the user whose directory it is in",
        errno.EINVAL: "it is no regular file",
        errno.ENXIO: "it is no regular file",
    }.get(error.errno or 0)
    if why is None:
        return tree.failure(place, error)
    return NotFound(f"{place} is not read", why, "see what the user keeps there")
