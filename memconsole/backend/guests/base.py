"""What the control process asks of a guest, whatever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

from memconsole.model import GuestKind

if TYPE_CHECKING:
    from signal import Signals

    from memconsole.backend.exports.offer import Offer
    from memconsole.model import GuestState, Progress, Vcpu

STOP_S = 5.0
"""Seconds a guest has to end in order."""


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


class GuestDriver(Protocol):
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

    def request_unmap(self, grant: str, within: float) -> bool:
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

    def vcpus(self) -> tuple[Vcpu, ...] | None:
        """Its vCPUs, where only its VMM can say; None where the VMM does not, or the kernel does."""

    def interrupt(self) -> None:
        """Ask it nothing more: who waits for its answer learns that none comes. :meth:`close` does the rest."""

    def close(self) -> None:
        """Let go of what this object holds; the guest goes on."""


class Canary(GuestDriver, Protocol):
    """A live canary."""

    def save(self, fd: int, within: float) -> None:
        """Pause it, and have it write what it is besides its RAM."""

    def blackout(self) -> tuple[int, int]:
        """How often it was restored, and the nanoseconds it did not run around the last time."""


class Qemu(GuestDriver, Protocol):
    """A live QEMU."""

    ram: str
    """The grant that is its RAM."""

    def save(self, fd: int, within: float) -> None:
        """Stop it, and have it write what it is besides its RAM."""

    def await_answer(self, within: float) -> None:
        """Wait until its monitor answers; GuestError when it does not in time."""

    def is_saved(self) -> bool:
        """Whether it was saved, and stands still since."""

    def quit(self, within: float) -> None:
        """Have it end by itself; GuestError when it does not in time."""

    def shares(self) -> bool:
        """Whether it can be saved without its RAM."""

    def passes_through(self) -> bool:
        """Whether a device of this host was given to it."""

    def restart(self, state: str, ram: str, *, paused: bool = False) -> Restart:
        """How it goes on from its ``state`` in custody, and its ``ram``, as custody calls them."""

    def agent_channel(self) -> Path | None:
        """The socket of its guest's agent; None where it has none."""

    def clocks(self) -> tuple[str, ...]:
        """What of a virtual machine's clocks its guest has."""


class Process(GuestDriver, Protocol):
    """A live process that joined."""

    def tell(self, number: Signals) -> None:
        """Send it a signal; Gone when it ended."""

    def ends(self, within: float) -> bool:
        """Whether it has ended, at most so many seconds from now."""


def is_process(live: GuestDriver | None) -> TypeGuard[Process]:
    """Whether it is a process that joined, which says so itself."""
    return live is not None and live.kind is GuestKind.PROCESS


def is_canary(live: GuestDriver | None) -> TypeGuard[Canary]:
    """Whether it is a canary, which says so itself."""
    return live is not None and live.kind is GuestKind.CANARY


def is_qemu(live: GuestDriver | None) -> TypeGuard[Qemu]:
    """Whether it is a QEMU, which says so itself."""
    return live is not None and live.kind is GuestKind.QEMU
