"""The tree beside what else lies in a directory: its subtrees, each mounted there by itself.

    STAGING                  the whole filesystem, where nobody but root looks (``native/fuse_mount.c``)
    MOUNT/guests             mount --bind STAGING/guests
    MOUNT/regions            mount --bind STAGING/regions
    MOUNT/files              mount --bind STAGING/files

So MOUNT may be the runtime directory, and hides nothing of it. What a server that died left attached is known by its
source, which is STAGING for all that were ever mounted there, and taken away first.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from memconsole.backend.kernel.mounts import MountInfo, mounts
from memconsole.errors import KernelRefused, Refused

SUBTREES = ("guests", "regions", "files")

_MS_BIND = 1 << 12
_MNT_DETACH = 1 << 1
_UMOUNT_NOFOLLOW = 1 << 3


def attach(staging: Path, device: int, point: Path) -> None:
    """Have the subtrees of the filesystem ``device`` at ``staging`` at a directory too; what is there already stays.

    Raises:
        Refused: something else lies or is mounted there (``MountHidesFiles``, ``MountTaken``).
        KernelRefused: a directory cannot be made, or mounted on.
    """
    point = point.parent.resolve() / point.name
    for name in SUBTREES:
        at = point / name
        while (top := _top(at)) is not None:
            if top.device == device and top.root == f"/{name}":
                break
            if top.source != str(staging):
                what = f"{top.fstype} of {top.source} is mounted there"
                raise Refused(f"{at} cannot be mounted", what, f"umount {at}", code="MountTaken")
            _call("umount2", os.fsencode(at), _MNT_DETACH | _UMOUNT_NOFOLLOW, path=at)
        if top is None:
            _make(at)
            _call("mount", os.fsencode(staging / name), os.fsencode(at), None, _MS_BIND, None, path=at)


def _top(at: Path) -> MountInfo | None:
    """What is mounted at a path, the last one over the others."""
    return next((each for each in reversed(mounts()) if each.path == at), None)


def _make(at: Path) -> None:
    try:
        at.mkdir(mode=0o755, exist_ok=True)
        with os.scandir(at) as entries:
            filled = next(entries, None)
    except OSError as error:
        raise KernelRefused(
            f"mkdir {at}", error.errno or 0, remedy="give it to --mount as an empty directory"
        ) from None
    if filled is not None:
        remedy = "move it away, or choose another directory for --mount"
        raise Refused(f"{at} cannot be mounted", f"it would hide {filled.name}", remedy, code="MountHidesFiles")


def _call(name: str, *arguments: object, path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*arguments):
        raise KernelRefused(name, ctypes.get_errno(), what=f"{path} cannot be mounted", remedy="see dmesg")
