"""A process held by pidfd and start time, so that nothing is ever done to another process of the same PID."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from memconsole import decoding
from memconsole.backend.kernel import census, tree
from memconsole.errors import Gone, GuestError, KernelRefused, Silent

KILLED_S = 60.0
"""Seconds a killed process may take to be gone: the kernel frees its memory first, page by page."""


def stat(pid: int, task: int | None = None) -> tuple[str, int]:
    """State letter and start time in clock ticks since boot (stat, fields 3 and 22) of a first thread, or of ``task``.

    The first thread may have left (Z) while the process goes on: whether it does its pidfd tells.

    Raises:
        Gone: there is no such process.
    """
    try:
        with open(f"{tree.of_process(pid, task)}/stat", "rb") as file:  # noqa: PTH123 - on the path of every snapshot
            words = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise Gone(f"process {pid} is gone", "it ended", "start it again, or name another process") from None
    with decoding.named(f"/proc/{pid}/stat", ""):
        return decoding.text(words[0]), int(words[19])


class Handle:
    """One process: ``pid``, ``start_ticks`` and a pidfd; ``child`` when it is ours to reap."""

    def __init__(self, pid: int, start_ticks: int | None = None, *, child: bool = False) -> None:
        """Take hold of a process.

        Raises:
            Gone: it does not exist, has ended, or its PID now belongs to another process.
        """
        if pid <= 0:
            raise Gone(f"process {pid} is gone", "no process has such a PID", "start it again, or name another process")
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            raise Gone(
                f"process {pid} is gone", error.strerror or "", "start it again, or name another process"
            ) from None
        self.pid = pid
        self._child = child
        why = "it ended"
        self.start_ticks = 0
        with contextlib.suppress(Gone):
            _, self.start_ticks = stat(pid)
            if start_ticks not in {None, self.start_ticks}:
                why = "its PID belongs to another process now"
            elif child or not self._has_ended(0):
                return
        os.close(self._pidfd)
        raise Gone(f"process {pid} is gone", why, "start it again, or name another process")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Its pidfd."""
        return self._pidfd

    def alive(self) -> bool:
        """Whether it runs; a process that ended and was not waited for by its parent does not."""
        return not self.wait(0)

    def stopped(self) -> bool:
        """Whether it was stopped by a signal or a tracer: all of its threads that live were.

        Raises:
            Gone: it ended.
        """
        self.check()
        if stat(self.pid)[0] not in "TtZX":
            return False
        letters = [letter for letter in self._letters() if letter not in "ZX"]
        self.check()
        return all(letter in "Tt" for letter in letters)

    def _letters(self) -> Iterator[str]:
        """The states of its threads; one that ends meanwhile has none."""
        for tid in census.threads("/", self.pid):
            with contextlib.suppress(Gone):
                yield stat(self.pid, tid)[0]

    def check(self) -> None:
        """Nothing, while it runs.

        Raises:
            Gone: it ended.
        """
        if not self.alive():
            raise Gone(f"process {self.pid} is gone", "it ended", "detach it, or start the guest again")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal.

        Raises:
            Gone: it ended.
            KernelRefused: we may not.
        """
        self.check()  # a zombie takes signals without a word
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            raise Gone(f"process {self.pid} is gone", "it ended", "start it again, or name another process") from None
        except OSError as error:
            raise KernelRefused("pidfd_send_signal", error.errno or 0, what=f"cannot signal {self.pid}") from None

    def wait(self, within: float) -> bool:
        """Whether it has ended, at most ``within`` seconds from now: the last of its threads has.

        Raises:
            Silent: another thread has let go of it, so it cannot be told.
        """
        if not self._has_ended(within):
            return False
        if self._child:
            self._child = False
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        return True

    def _has_ended(self, within: float) -> bool:
        pidfd = self._pidfd
        if pidfd < 0:
            why = "memconsole released its guest"
            raise Silent(f"process {self.pid} is not watched any more", why, "memconsole guests lists them")
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(max(0, int(within * 1000))))

    def kill(self) -> None:
        """SIGKILL it and wait until it is gone; one that is gone already is no error.

        Raises:
            GuestError: it is still there after ``KILLED_S`` seconds.
        """
        with contextlib.suppress(Gone):
            self.signal(signal.SIGKILL)
        if not self.wait(KILLED_S):
            raise GuestError(
                f"process {self.pid} does not die",
                f"it is still there {KILLED_S:g} s after SIGKILL, held in the kernel",
                "look at /proc/PID/stack; abort the FUSE connection it waits for",
            )

    def end(self, within: float) -> None:
        """SIGTERM, and SIGKILL when that did not help within ``within`` seconds."""
        with contextlib.suppress(Gone):
            self.signal(signal.SIGTERM)
        if not self.wait(within):
            self.kill()

    def close(self) -> None:
        """Let go of the pidfd; the process goes on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


GIVEN_FD = 3
"""The number under which a started program finds the first fd it is given; the others follow."""


def spawn(argv: list[str], log: Path, *fds: int) -> Handle:
    """Start a program that outlives us: its own session, no terminal, output into ``log``, ``fds`` from GIVEN_FD on.

    Raises:
        GuestError: it cannot be started.
    """
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.fspath(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    with contextlib.ExitStack() as stack:
        for number, fd in enumerate(fds, GIVEN_FD):
            # from above all of their numbers, so that none is overwritten before its turn
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, GIVEN_FD + len(fds))
            stack.callback(os.close, copy)
            actions.append((os.POSIX_SPAWN_DUP2, copy, number))
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            pid = os.posix_spawnp(
                argv[0], argv, os.environ, file_actions=actions, setsid=True, setsigmask=[], setsigdef=[signal.SIGPIPE]
            )
        except OSError as error:
            remedy = f"install {argv[0]}" if isinstance(error, FileNotFoundError) else ""
            raise GuestError(f"{argv[0]} cannot be started", error.strerror or "", remedy) from None
    return Handle(pid, child=True)


def last_words(log: Path, lines: int = 5) -> str:
    """The last lines of a program's log, for an error."""
    try:
        text = log.read_text(errors="replace").strip().splitlines()
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    return "; ".join(text[-lines:]) or "its log is empty"
