"""RAM as files with a name, on a tmpfs of memconsole's own: what a QEMU that somebody else starts is given as its RAM.

    /run/memconsole/ram                 the tmpfs; whoever starts a QEMU sees it, only root can write to it
    /run/memconsole/ram/UUID/BLOCK      a block, of the user that QEMU runs as

QEMU opens such a file once, by its name. The name is taken away as soon as it has; then it is memory like a memfd, and
its frames live as long as somebody has it. Transparent huge pages are used where QEMU asks for them, as it does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from memconsole import paths
from memconsole.backend.kernel import mounts
from memconsole.backend.stores import ext4
from memconsole.errors import KernelRefused, MemconsoleError

SOURCE = "memconsole-ram"
_SIZE = "mode=0711,size=100%"
_HUGE = f"{_SIZE},huge=advise"


def place() -> Path:
    """Where the tmpfs is: one for the host, as libvirt's hook and AppArmor's rules know it."""
    return paths.HOST / "ram"


def domains() -> list[str]:
    """The UUIDs of the domains that have files here, of whichever control process."""
    try:
        return sorted(os.listdir(place()))  # noqa: PTH208 - asked for each second: nothing more is wanted
    except (FileNotFoundError, PermissionError):
        return []


def directory(uuid: str) -> Path:
    """Where the files of a domain lie."""
    return place() / uuid


def make(uuid: str) -> Path:
    """The empty directory of a domain; the tmpfs is mounted where it is not.

    Raises:
        Refused, KernelRefused: it cannot be mounted, or the directory cannot be made.
    """
    paths.make_directory(paths.HOST, 0o755)
    with contextlib.suppress(FileExistsError):
        place().mkdir(mode=0o711)
    if not any(each.path == place() and each.source == SOURCE for each in mounts.mounts()):
        _mount()
    made = directory(uuid)
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(mode=0o711)
        made.chmod(0o711)
    except OSError as error:
        raise KernelRefused(f"mkdir {made}", error.errno or 0) from None
    return made


def _mount() -> None:
    what = f"a tmpfs cannot be mounted at {place()}"
    try:
        ext4.run(["mount", "-t", "tmpfs", "-o", _HUGE, SOURCE, str(place())], what)
    except MemconsoleError:  # a kernel without huge pages knows no such option
        ext4.run(["mount", "-t", "tmpfs", "-o", _SIZE, SOURCE, str(place())], what)


def create(path: Path, size: int, owner: tuple[int, int]) -> int:
    """A descriptor of a new file of so many zeroes, of a user and a group.

    Raises:
        KernelRefused: it cannot be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, size)
            os.fchown(fd, *owner)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise KernelRefused(f"open {path}", error.errno or 0, what="RAM cannot be set aside") from None
    return fd


def forget(uuid: str) -> None:
    """Take the names of a domain's files away, and the tmpfs where nobody has anything of it."""
    shutil.rmtree(directory(uuid), ignore_errors=True)
    with contextlib.suppress(MemconsoleError, OSError):  # a QEMU has RAM there: it stays
        if not any(place().iterdir()):
            ext4.unmount(place())
            place().rmdir()
