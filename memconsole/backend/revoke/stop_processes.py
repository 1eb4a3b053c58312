"""Processes stopped while the contents move, so that what is copied is of one moment.

SIGSTOP, not the freezer of cgroups: it reaches every process whatever group it is in. The pidfd of each lies in custody
(``halted:PID``) while it is stopped, so that a control process that dies meanwhile leaves nobody stopped for good.

Somebody may send that meanwhile; what is written then, after it was
copied, is lost with the old file: the contents kept are those of some moment of the copy for each page. No process
gains access that way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

from memconsole.backend import needs
from memconsole.backend.peers.handle import Handle
from memconsole.errors import Gone

_KIND = "halted"
_LOOK_S = 0.001
_MANNERS_S = 1.0
"""Seconds a process has to stop; one that waits in the kernel does so when it comes back."""


@contextlib.contextmanager
def processes_stopped(
    desk: needs.InCustody, who: Callable[[], tuple[int, ...]], within: float
) -> Iterator[Callable[[], str]]:
    """Stop everybody in ``who()``, again and again until it names nobody new; let them go on at the end.

    Those who were stopped before stay stopped. Yields what says, afterwards, who could not be stopped.
    """
    deadline = time.monotonic() + within
    stopped: dict[int, Handle] = {}
    running: set[int] = set()
    with contextlib.ExitStack() as stack:
        while (new := [pid for pid in who() if pid not in stopped]) and time.monotonic() < deadline:
            for pid in new:
                with contextlib.suppress(Gone):
                    stopped[pid] = handle = stack.enter_context(Handle(pid))
                    if pid == 1 or handle.stopped():
                        continue
                    desk.custody.put(_name(pid), handle.fileno())
                    stack.callback(_continue, desk, pid, handle.fileno())
                    handle.signal(signal.SIGSTOP)
            ends = min(deadline, time.monotonic() + _MANNERS_S)
            running = {pid for pid in new if pid in stopped and not _stops(stopped[pid], ends)}
        yield lambda: f"not stopped meanwhile: {', '.join(map(str, sorted(running)))}" if running else ""


def _stops(handle: Handle, deadline: float) -> bool:
    with contextlib.suppress(Gone):
        while not handle.stopped():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
    return True


def continue_stopped(desk: needs.InCustody) -> None:
    """Let those go on whom an earlier control process stopped."""
    for name in desk.custody.names():
        kind, _, pid = name.partition(":")
        if kind == _KIND:
            pidfd, _ = desk.custody.get(name)
            try:
                _continue(desk, int(pid), pidfd)
            finally:
                os.close(pidfd)


def _continue(desk: needs.InCustody, pid: int, pidfd: int) -> None:
    with contextlib.suppress(OSError):  # it has ended
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    desk.custody.drop(_name(pid))


def _name(pid: int) -> str:
    return f"{_KIND}:{pid}"
