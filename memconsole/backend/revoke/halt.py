"""Processes stopped while the contents move, so that what is copied is of one moment.

SIGSTOP, not the freezer of cgroups: it reaches every process whatever group it is in, and a process that dies with us
in the middle is let go on by SIGCONT from anybody. Somebody may send that meanwhile; what is written then, after it was
copied, is lost with the old file: the contents kept are those of some moment of the copy for each page. No process
gains access that way.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from memconsole.backend.guests.handle import Handle
from memconsole.errors import Gone, KernelRefused
from memconsole.model import GuestState

if TYPE_CHECKING:
    from memconsole.backend.desk import Desk

_LOOK_S = 0.001
_MANNERS_S = 1.0
"""Seconds a process has to stop; one that waits in the kernel does so when it comes back."""


@contextlib.contextmanager
def halted(
    desk: Desk, who: Callable[[], tuple[int, ...]], within: float, *, again: bool
) -> Iterator[Callable[[], str]]:
    """Stop everybody in ``who()``, again and again until it names nobody new; let them go on at the end.

    Those who were stopped before stay stopped; with ``again`` only those whose guest is paused, for the others were
    stopped by a control process that died. Yields what says, afterwards, who could not be stopped.
    """
    deadline = time.monotonic() + within
    stopped: dict[int, Handle] = {}
    running: set[int] = set()
    asleep = {guest.pid for guest in desk.state.guests.values() if guest.state is GuestState.PAUSED}
    with contextlib.ExitStack() as stack:
        while (new := [pid for pid in who() if pid not in stopped]) and time.monotonic() < deadline:
            for pid in new:
                with contextlib.suppress(Gone):
                    stopped[pid] = handle = stack.enter_context(Handle(pid))
                    if pid == 1 or (handle.stopped() and not (again and pid not in asleep)):
                        continue
                    handle.signal(signal.SIGSTOP)
                    stack.callback(_go_on, handle)
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


def _go_on(handle: Handle) -> None:
    with contextlib.suppress(Gone, KernelRefused):
        handle.signal(signal.SIGCONT)
