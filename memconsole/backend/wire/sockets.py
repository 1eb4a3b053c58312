"""Sockets and locks in the file system: right from their first moment, replaced only when nobody answers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from pathlib import Path

from memconsole import decoding
from memconsole.errors import KernelRefused, Refused, UsageError

log = logging.getLogger("memconsole.wire")

SOCKET_MODE = 0o666
"""Everybody may connect, so that whoever is denied is told so by name, and the denial is recorded."""

_LONGEST_PATH = 107


class Lock:
    """The right to be the one control process of a directory: an exclusive flock, which ends with this process.

    Raises:
        Refused: another has it (``AlreadyServing``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = decoding.text(os.read(self._fd, 32)).strip()
            os.close(self._fd)
            raise Refused(
                f"{path.parent} is served already",
                f"by process {holder or 'unknown'}",
                "stop that process, or give this one a state directory of its own",
                code="AlreadyServing",
            ) from None
        with contextlib.suppress(OSError):  # who has it is for people to read: a disk that is full keeps nobody from it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the right up; the file stays, for removing it would race with the next."""
        os.close(self._fd)


def bind(path: Path, mode: int = SOCKET_MODE) -> socket.socket:
    """A listening socket at ``path``; one that nobody answers on any more is replaced.

    It exists with mode 0600 or less from its first moment, and with ``mode`` once it listens.

    Raises:
        Refused: somebody answers there (``SocketInUse``), or what is there is no socket (``NotASocket``).
        UsageError: the path is longer than a socket's may be.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(
            f"{path} is too long", f"a socket's path has at most {_LONGEST_PATH} bytes", "give a shorter path"
        )
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind(2) gives the file the mode of the socket's inode
        sock.bind(str(path))
        sock.listen(512)
        path.chmod(mode)
    except OSError as error:
        sock.close()
        raise KernelRefused(f"bind {path}", error.errno or 0) from None
    return sock


def _clear(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Refused(f"{path} cannot be a socket", "a file has this name", "move it away", code="NotASocket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            log.info("replacing %s: no process answers there", path)
            path.unlink(missing_ok=True)
            return
        except TimeoutError:
            pass
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise KernelRefused(f"connect {path}", error.errno or 0) from None
    raise Refused(
        f"{path} is in use", "another control process answers there", "use that control process, or another --socket",
        code="SocketInUse",
    )  # fmt: skip
