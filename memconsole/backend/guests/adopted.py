"""A guest that somebody else started and that was adopted: its RAM is in custody, and nothing else of it is ours.

It is watched, and neither paused, nor resumed, nor ended: who started it does that (of libvirt's: virsh).
"""

from __future__ import annotations

from typing import Self

from memconsole.backend.exports.offer import Offer
from memconsole.backend.peers.handle import Handle
from memconsole.errors import GuestError
from memconsole.model import GuestKind, GuestState, Progress, Vcpu


class AdoptedGuest:
    """A process, held by ``handle``."""

    kind = GuestKind.FOREIGN

    def __init__(self, name: str, handle: Handle) -> None:
        self.name = name
        self.pid = handle.pid
        self.start_ticks = handle.start_ticks
        self._handle = handle

    @classmethod
    def adopt(cls, name: str, pid: int, start_ticks: int) -> Self:
        """Take hold of it.

        Raises:
            Gone: its process ended, or its PID belongs to another one now.
        """
        return cls(name, Handle(pid, start_ticks))

    def state(self) -> GuestState:
        """Running, paused (stopped by a signal), or gone; what its manager says of it is known elsewhere."""
        if not self._handle.alive():
            return GuestState.GONE
        return GuestState.PAUSED if self._handle.stopped() else GuestState.RUNNING

    def agent(self) -> bool:
        """It has none."""
        return False

    def offer(self, offer: Offer, within: float) -> bool:  # noqa: ARG002 - it takes nothing
        """It takes nothing."""
        return False

    def request_unmap(self, grant: str, within: float) -> bool:  # noqa: ARG002 - it gives nothing back
        """It gives nothing back."""
        return False

    def pause(self) -> None:
        """Refused."""
        raise self._not_ours("paused")

    def resume(self) -> None:
        """Refused."""
        raise self._not_ours("resumed")

    def stop(self, within: float) -> None:
        """Nothing: it goes on."""

    def kill(self) -> None:
        """Refused."""
        raise self._not_ours("ended")

    def _not_ours(self, done: str) -> GuestError:
        return GuestError(f"guest {self.name} is not {done} by memconsole", "it is adopted", "ask who started it")

    def progress(self) -> Progress | None:
        """None: it does not say."""
        return None

    def vcpus(self) -> tuple[Vcpu, ...] | None:
        """None: the kernel or its manager shows those it has."""
        return None

    def interrupt(self) -> None:
        """Nothing waits for it."""

    def close(self) -> None:
        """Let go of it; it goes on."""
        self._handle.close()
