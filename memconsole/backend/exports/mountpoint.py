"""Where the mount lies: the directory that was asked for, and the private one of the whole filesystem."""

from __future__ import annotations

import contextlib
import stat
from pathlib import Path

from memconsole.backend.exports.attach import SUBTREES
from memconsole.errors import Refused
from memconsole.paths import check_above, make_directory


def refuse_mountpoint(mountpoint: Path, *, runtime: Path, state_dir: Path) -> None:
    """Nothing, for a directory in which the tree can be.

    Raises:
        Refused: it is a file (``NotADirectory``), would hide the service's own files there (``MountHidesRuntime``), or
            lies below somebody else's directory (``NotPrivate``).
    """
    check_above(mountpoint)
    with contextlib.suppress(OSError):  # what is missing is made; what a dead server left there is mounted over
        if not stat.S_ISDIR(mountpoint.stat().st_mode):
            remedy = "give --mount a directory, or a name that is free: it is made"
            raise Refused(f"nothing can be mounted at {mountpoint}", "it is a file", remedy, code="NotADirectory")
    for name in SUBTREES:
        place = mountpoint.parent.resolve() / mountpoint.name / name
        for hidden in (runtime.resolve(), state_dir.resolve()):
            if hidden.is_relative_to(place):
                raise Refused(
                    f"nothing can be mounted at {place}",
                    f"it would hide {hidden}, where the service has its own files",
                    f"memconsole serve --mount {runtime}",
                    code="MountHidesRuntime",
                )


def staging(runtime: Path) -> Path:
    """Where the whole filesystem is, of which the mountpoint has the subtrees: in a directory that only root enters.

    Raises:
        Refused, KernelRefused: the directory cannot be.
    """
    private = runtime.absolute() / "mount"
    make_directory(private, 0o700)
    place = private / "tree"
    with contextlib.suppress(FileExistsError):  # which it is; nothing looks at what a dead server left there
        place.mkdir(mode=0o700)
    return place.parent.resolve() / place.name
