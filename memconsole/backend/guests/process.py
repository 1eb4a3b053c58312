"""A guest that is any process: attached by PID, paused by SIGSTOP, its memory handed over through its own agent."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests.base import Offer
from memconsole.backend.guests.handle import Handle
from memconsole.model import GuestKind, GuestState, Progress


class ProcessGuest:
    """A process that joined; it can take grants once its agent (:mod:`memconsole.agent`) has connected."""

    kind = GuestKind.PROCESS

    def __init__(self, name: str, handle: Handle, hub: Hub) -> None:
        self.name = name
        self.pid = handle.pid
        self.start_ticks = handle.start_ticks
        self._handle = handle
        self._hub = hub

    @classmethod
    def attach(cls, name: str, pid: int, hub: Hub) -> ProcessGuest:
        """Take a running process as a guest.

        Raises:
            Gone: there is no such process.
            Refused: it is a guest already.
        """
        return cls._hold(name, Handle(pid), hub, ())

    @classmethod
    def adopt(cls, name: str, pid: int, start_ticks: int, hub: Hub, offers: Iterable[Offer] = ()) -> ProcessGuest:
        """Take a guest over from an earlier control process, with the grants it has.

        Raises:
            Gone: the process ended, or its PID belongs to another one now.
        """
        return cls._hold(name, Handle(pid, start_ticks), hub, offers)

    @classmethod
    def _hold(cls, name: str, handle: Handle, hub: Hub, offers: Iterable[Offer]) -> ProcessGuest:
        try:
            hub.register(name, handle.pid, handle.start_ticks, offers)
        except BaseException:
            handle.close()
            raise
        return cls(name, handle, hub)

    def state(self) -> GuestState:
        """Running, paused (stopped by a signal), or gone."""
        if not self._handle.alive():
            return GuestState.GONE
        return GuestState.PAUSED if self._handle.stopped() else GuestState.RUNNING

    def agent(self) -> bool:
        """Whether its agent is connected."""
        return self._hub.connected(self.name)

    def offer(self, offer: Offer, within: float) -> bool:
        """Hand a grant over; false while its agent has not connected: it gets the grant when it does."""
        self._handle.check()
        return self._hub.offer(self.name, offer, within)

    def ask_unmap(self, grant: str, within: float) -> bool:
        """Ask its agent to unmap a grant; one that is not connected cannot."""
        self._handle.check()
        return self._hub.ask_unmap(self.name, grant, within)

    def pause(self) -> None:
        """SIGSTOP."""
        self._handle.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._handle.signal(signal.SIGCONT)

    def stop(self, within: float) -> None:  # noqa: ARG002 - the process is only let go
        """Let the process go; it goes on without its grants being ours to ask for."""
        self._hub.unregister(self.name)

    def kill(self, within: float) -> None:
        """SIGKILL and wait until it is gone."""
        self._handle.kill(within)
        self._hub.unregister(self.name)

    def progress(self) -> Progress | None:
        """None: a process does not say."""
        return None

    def close(self) -> None:
        """Let go of what this object holds; the process goes on."""
        self._hub.unregister(self.name)
        self._handle.close()
