"""Has guests end with the process that has their memory, however that ends: ``native/guard.c``, a child of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

from memconsole.errors import Gone, MemconsoleError
from memconsole.native import program

ENDS_S = 60.0
"""Seconds a guard has to end once it was told to; one that is stopped is killed then, which ends no guest."""


class Guard:
    """Ends processes, and removes a directory, once this process has ended without :meth:`close`.

    Raises:
        MemconsoleError: it cannot be started.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [program("memconsole-guard"), *([str(directory)] if directory else [])]
        with its:
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=its.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                self._ours.close()
                raise MemconsoleError(
                    f"{words[0]} cannot be started", error.strerror or "", "install the package again"
                ) from None

    def bind(self, pid: int) -> None:
        """Have a process end with this one.

        Raises:
            Gone: it has ended already, or the guard has.
        """
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            raise Gone(f"process {pid} is gone", "it ended", "see its log") from None
        try:
            socket.send_fds(self._ours, [b"\0"], [process], socket.MSG_NOSIGNAL)
        except OSError as error:
            why = error.strerror or ""
            raise Gone("the guard of guests is gone", why, "start the console anew: guests would outlive it") from None
        finally:
            os.close(process)

    def close(self) -> None:
        """Let it end, and what it was told of go on."""
        with self._ours, contextlib.suppress(OSError):
            self._ours.send(b"\0", socket.MSG_NOSIGNAL)
        try:
            self._process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
