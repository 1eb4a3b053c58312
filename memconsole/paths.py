"""Where memconsole's files lie: sockets and guests' files in the runtime directory, state beside them.

A directory is made so that no other user can put another in its place.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from memconsole.errors import KernelRefused, Refused

HOST = Path("/run/memconsole")
"""The runtime directory of the host's own service."""


def runtime_dir() -> Path:
    """``/run/memconsole`` for root, else a directory of the user's own."""
    if os.geteuid() == 0:
        return HOST
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "memconsole" if base else Path(f"/tmp/memconsole-{os.geteuid()}")  # noqa: S108 - made 0700


def control_socket(runtime: Path | None = None) -> Path:
    """The Varlink socket of the control process."""
    return (runtime or runtime_dir()) / "control"


def nearest_socket() -> Path:
    """The control socket to ask: the user's own where there is one, else the host's where this user may connect."""
    own, host = control_socket(), control_socket(HOST)
    return host if not own.exists() and os.access(host, os.W_OK) else own


def state_dir() -> Path:
    """Where the audit trail and the history are kept: ``/var/lib/memconsole`` for root, else ``$XDG_STATE_HOME``."""
    return Path("/var/lib/memconsole") if os.geteuid() == 0 else own_state_dir()


def own_state_dir() -> Path:
    """Where what is this user's own is kept, root's too: how the console's tables are laid out, what was typed."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "memconsole"


def make_directory(path: Path, mode: int) -> None:
    """Make a directory with exactly this mode if it is missing, its parents too.

    Raises:
        Refused: it is there and is not a directory of this user or root, or others may write to it or could put
            another in its place (``NotPrivate``).
    """
    check_above(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=False)
        path.chmod(mode)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {0, os.geteuid()} or found.st_mode & 0o022:
            raise Refused(
                f"{path} cannot be used",
                "it is not a directory that only this user can write to",
                f"remove it, or chmod go-w {path}",
                code="NotPrivate",
            ) from None
    except OSError as error:
        raise KernelRefused(f"mkdir {path}", error.errno or 0, remedy="give another directory") from None


def sync_directory(path: Path) -> None:
    """Have the names in a directory be on its disk; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_above(path: Path) -> None:
    """Nothing, for a path that nobody but root and this user can make lead elsewhere.

    Whoever owns a directory, or may write to it, can put another in the place of what is in it, unless it is sticky and
    what is in it belongs to somebody else. A group may write where it is this user's own, or root's.

    Raises:
        Refused: a directory above it, or a link on the way, is somebody else's (``NotPrivate``).
    """
    seen = {*path.absolute().parents, *Path(os.path.realpath(path)).parents}
    for above in sorted(seen):
        try:
            found = above.lstat()
        except FileNotFoundError:
            continue  # it is made, by this user
        except OSError as error:
            raise KernelRefused(f"lstat {above}", error.errno or 0, remedy="give another directory") from None
        if why := _of_others(found):
            raise Refused(
                f"{path} cannot be used",
                f"{above} {why}: another user could replace it",
                f"give another directory, or have this one be root's alone: chown root {above}; chmod go-w {above}",
                code="NotPrivate",
            )


def _of_others(found: os.stat_result) -> str:
    """Who but root and this user can change what is in a directory, or where a link leads; empty if nobody can."""
    if found.st_uid not in {0, os.geteuid()}:
        return f"belongs to user {found.st_uid}"
    if stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX:
        return ""
    if found.st_mode & 0o002:
        return "is writable by every user"
    if found.st_mode & 0o020 and found.st_gid not in {0, os.getegid()}:
        return f"is writable by group {found.st_gid}"
    return ""
