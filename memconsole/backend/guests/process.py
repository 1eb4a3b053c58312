"""A guest that is any process: attached by PID, paused by SIGSTOP, its memory handed over through its own agent."""

from __future__ import annotations

import signal

from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests.agented import AgentedGuest
from memconsole.backend.peers.handle import Handle
from memconsole.model import GuestKind, GuestState, Progress


class ProcessGuest(AgentedGuest):
    """A process that joined; it can take grants once its agent (:mod:`memconsole.agent`) has connected."""

    kind = GuestKind.PROCESS

    @classmethod
    def attach(cls, name: str, pid: int, hub: Hub) -> ProcessGuest:
        """Take a running process as a guest.

        Raises:
            Gone: there is no such process.
            Refused: it is a guest already.
        """
        return cls._hold(name, Handle(pid), hub)

    def state(self) -> GuestState:
        """Running, paused (stopped by a signal), or gone."""
        if not self._handle.alive():
            return GuestState.GONE
        return GuestState.PAUSED if self._handle.stopped() else GuestState.RUNNING

    def pause(self) -> None:
        """SIGSTOP."""
        self._handle.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._handle.signal(signal.SIGCONT)

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._handle.signal(number)

    def ends(self, within: float) -> bool:
        """Whether it has ended, at most so many seconds from now."""
        return self._handle.wait(within)

    def stop(self, within: float) -> None:  # noqa: ARG002 - the process is only let go
        """Let the process go; it goes on without its grants being ours to ask for."""
        self.interrupt()

    def progress(self) -> Progress | None:
        """None: a process does not say."""
        return None
