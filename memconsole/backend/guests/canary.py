"""The built-in guest: a tiny VM (``native/canary.c``) that counts, and checks its own memory while it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from memconsole.agent import Type
from memconsole.backend.exports.answers import AgentReply
from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests.agented import AgentedGuest
from memconsole.backend.guests.base import Restart
from memconsole.backend.peers.handle import GIVEN_FD, last_words, spawn
from memconsole.backend.peers.patience import Patience
from memconsole.errors import GuestError
from memconsole.model import GuestKind, GuestState, Progress
from memconsole.native import program

ANSWERS = 2.0
"""Seconds a canary has for what it answers between two beats."""


class CanaryGuest(AgentedGuest):
    """A canary: its RAM is what it is offered, its vCPU runs from the first grant it may write to."""

    kind = GuestKind.CANARY

    @classmethod
    def start(
        cls, name: str, hub: Hub, directory: Path, *, args: Sequence[str] = (), within: float = 10.0
    ) -> CanaryGuest:
        """Start a canary, its log in ``directory``; ``args`` go to the program (``--as process``).

        Raises:
            GuestError: it cannot start, or its agent did not connect within so many seconds; nothing is left of it.
        """
        log = directory / "log"
        argv = [program("memconsole-canary"), "--socket", str(hub.path), "--name", name, *args]
        handle = spawn(argv, log)
        try:
            hub.register(name, handle.pid, handle.start_ticks)
        except BaseException:
            handle.kill()
            handle.close()
            raise
        patience = Patience(handle.pid, within)
        while patience.left() and handle.alive():
            if hub.connected(name, 0.1):
                return cls(name, handle, hub)
        why = f"its agent did not connect within {within:g} s" if handle.alive() else last_words(log)
        handle.kill()
        hub.unregister(name)
        handle.close()
        raise GuestError(f"canary {name} did not start", why, f"see {log}")

    def state(self) -> GuestState:
        """Running, paused (also while it has no RAM), stopped when its vCPU cannot go on, or gone."""
        if not self._handle.alive():
            return GuestState.GONE
        states = {"running": GuestState.RUNNING, "paused": GuestState.PAUSED, "failed": GuestState.STOPPED}
        return states[self._ask(Type.REPORT).state]

    def pause(self) -> None:
        """Stop its vCPU at the end of a beat."""
        self._ask(Type.PAUSE, patient=True)

    def resume(self) -> None:
        """Let it go on."""
        self._ask(Type.RESUME, patient=True)

    def save(self, fd: int, within: float) -> None:
        """Pause it, and have it write what it is besides its RAM (vCPU, ranges) into the file, from its start.

        :meth:`resume` lets this one go on; :meth:`restart` starts the one that goes on in its place.

        Raises:
            GuestError: it cannot be saved; it stands still all the same.
        """
        self._ask(Type.SAVE, within, fd, patient=True)

    def restart(self, agents: Path, state: str, grants: Sequence[tuple[str, str]], *, paused: bool = False) -> Restart:
        """How it goes on: see :meth:`again`."""
        return self.again(self.name, agents, state, grants, paused=paused)

    @staticmethod
    def again(
        name: str, agents: Path, state: str, grants: Sequence[tuple[str, str]], *, paused: bool = False
    ) -> Restart:
        """How one goes on from its ``state`` in custody, its ``grants`` with what each is a part of in custody."""
        fds = [(state, GIVEN_FD), *((segment, GIVEN_FD + 1 + row) for row, (_, segment) in enumerate(grants))]
        given = [("--give", f"{grant}={GIVEN_FD + 1 + row}") for row, (grant, _) in enumerate(grants)]
        words = (
            *(program("memconsole-canary"), "--socket", str(agents), "--name", name),
            *("--restore", str(GIVEN_FD), *(word for pair in given for word in pair)),
            *(("--paused", "yes") if paused else ()),
        )
        return Restart(words, tuple(fds))

    def blackout(self) -> tuple[int, int]:
        """How often it was restored, and the nanoseconds it did not run around the last time, as it saw it itself."""
        answer = self._ask(Type.REPORT)
        return answer.restored, answer.blackout_ns

    def stop(self, within: float) -> None:
        """End it, by force after ``within`` seconds."""
        if self._handle.alive():
            self._handle.end(within)
        self.interrupt()

    def progress(self) -> Progress | None:
        """Its counters: beats, stamps checked, wrong bytes, and the longest pause that nobody commanded.

        ``why`` its vCPU cannot go on: ``the vCPU reached gpa 0x..., where no RAM is``.
        """
        return self._ask(Type.REPORT).progress

    def _ask(self, type: Type, within: float = ANSWERS, fd: int | None = None, *, patient: bool = False) -> AgentReply:
        self._handle.check()
        answer = self._hub.ask(self.name, type, within, fd, patient=patient)
        if answer.status:
            raise GuestError(
                f"canary {self.name} refused {type.name}", answer.text or os.strerror(answer.status), "see its log"
            )
        return answer
