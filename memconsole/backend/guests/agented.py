"""A guest with an agent on the agents socket: it takes grants, and gives them back when it is asked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from memconsole.backend.exports.fd import Hub
from memconsole.backend.exports.offer import Offer
from memconsole.backend.peers.handle import Handle
from memconsole.model import Vcpu


class AgentedGuest:
    """A process, held by ``handle``, whose agent speaks to ``hub``."""

    def __init__(self, name: str, handle: Handle, hub: Hub) -> None:
        self.name = name
        self.pid = handle.pid
        self.start_ticks = handle.start_ticks
        self._handle = handle
        self._hub = hub
        self._left = False

    @classmethod
    def adopt(cls, name: str, pid: int, start_ticks: int, hub: Hub, offers: Iterable[Offer] = ()) -> Self:
        """Take a guest over from an earlier control process, with the grants it has.

        Raises:
            Gone: its process ended, or its PID belongs to another one now.
        """
        return cls._hold(name, Handle(pid, start_ticks), hub, offers)

    @classmethod
    def _hold(cls, name: str, handle: Handle, hub: Hub, offers: Iterable[Offer] = ()) -> Self:
        """Let a process in as a guest; the handle is closed if it is not."""
        try:
            hub.register(name, handle.pid, handle.start_ticks, offers)
        except BaseException:
            handle.close()
            raise
        return cls(name, handle, hub)

    def agent(self) -> bool:
        """Whether its agent is connected."""
        return self._hub.connected(self.name)

    def offer(self, offer: Offer, within: float) -> bool:
        """Hand a grant over; false while its agent has not connected: it gets the grant when it does."""
        self._handle.check()
        return self._hub.offer(self.name, offer, within)

    def request_unmap(self, grant: str, within: float) -> bool:
        """Ask its agent to unmap a grant; one that is not connected cannot."""
        self._handle.check()
        return self._hub.request_unmap(self.name, grant, within)

    def kill(self) -> None:
        """SIGKILL and wait until it is gone."""
        self._handle.kill()
        self.interrupt()

    def interrupt(self) -> None:
        """Leave the hub, once: another guest may have this one's name there afterwards."""
        if not self._left:
            self._left = True
            self._hub.unregister(self.name)

    def vcpus(self) -> tuple[Vcpu, ...] | None:
        """None: the kernel shows those it has."""
        return None

    def close(self) -> None:
        """Let go of what this object holds; the guest goes on."""
        self.interrupt()
        self._handle.close()
