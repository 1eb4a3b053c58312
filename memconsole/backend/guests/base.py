"""What the control process asks of a guest, whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from memconsole.model import Access, GuestKind, GuestState, Progress


@dataclass(frozen=True)
class Offer:
    """A grant as a guest receives it: ``fd`` of the region's segment, byte ``offset`` and ``length`` in it, ``gpa``.

    ``wants``: what its userfaultfd is wanted for (``native/agent.h``); 0 for nothing. ``window``: it is no RAM, but the
    registers of a device.
    """

    grant: str
    fd: int
    offset: int
    length: int
    access: Access
    gpa: int | None
    wants: int = 0
    window: bool = False


@dataclass(frozen=True)
class Restart:
    """How a guest whose state was saved is started again, here or under the next kernel, without this code.

    ``words`` is the command line, ``fds`` says under which number it finds what custody calls so; ``lines`` are said to
    the monitor at ``socket`` afterwards, each until its answer contains the second text. A guest without them goes on
    by itself.
    """

    words: tuple[str, ...]
    fds: tuple[tuple[str, int], ...]
    socket: str = ""
    lines: tuple[tuple[str, str], ...] = ()


class Guest(Protocol):
    """A live guest; every method is bounded in time and may raise GuestError (no answer) or Gone (process ended)."""

    name: str
    kind: GuestKind
    pid: int
    start_ticks: int

    def state(self) -> GuestState:
        """Running, paused, or gone, as the VMM says now."""

    def agent(self) -> bool:
        """Whether it would answer a request to unmap."""

    def offer(self, offer: Offer, within: float) -> bool:
        """Hand a grant over; true once the guest says it has mapped it, false if it has no agent to take it (yet)."""

    def ask_unmap(self, grant: str, within: float) -> bool:
        """Ask it to unmap a grant and close its fd; true once it says it did, false if it cannot or will not."""

    def pause(self) -> None:
        """Stop its vCPUs (a plain process: SIGSTOP)."""

    def resume(self) -> None:
        """Let it go on."""

    def stop(self, within: float) -> None:
        """End it in order, by force after ``within`` seconds; an attached process is only let go."""

    def kill(self) -> None:
        """SIGKILL and wait until it is gone."""

    def progress(self) -> Progress | None:
        """What it says of its own progress, if it can."""

    def close(self) -> None:
        """Let go of what this object holds; the guest goes on."""
