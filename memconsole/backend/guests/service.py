"""A guest that is a service: how it is started behind a gate, told to save, and asked whether it answers.

A command is started as a shell that waits for a line before it becomes the program: the ledger knows the process, and
its files are its user's, before it opens one of them. Whoever dies before the line is written leaves a pipe that ends,
and the shell ends with it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

from memconsole import unforeseen
from memconsole.backend.guests import units
from memconsole.backend.guests.base import Process
from memconsole.backend.peers.handle import last_words
from memconsole.errors import GuestError
from memconsole.model import Service

_GATE = 'read -r go && exec "$@" </dev/null'
_LOOK_S = 0.1


def signal_of(name: str) -> signal.Signals | None:
    """A signal by its name (``SIGUSR1``, ``usr1``), or its number; None where there is none."""
    with contextlib.suppress(ValueError):
        return signal.Signals(int(name))
    return signal.Signals.__members__.get(name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}")


class GatedStart:
    """A command that was started and waits; ``pid`` is its process's, which stays the same."""

    def __init__(self, service: Service, log: Path) -> None:
        """Start it, and have it wait.

        Raises:
            GuestError: it cannot be started.
        """
        try:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with log.open("ab") as written:
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", _GATE, "sh", *service.command],
                    stdin=subprocess.PIPE,
                    stdout=written,
                    stderr=written,
                    start_new_session=True,
                    **_as_user(service),  # type: ignore[call-overload]
                )
        except (OSError, subprocess.SubprocessError) as error:
            remedy = "see whether its user and its directory are there"
            raise GuestError(f"{service.command[0]} cannot be started", str(error), remedy) from None
        self.pid: int = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Without a line it ends; whatever it is, it is waited for when it does."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        unforeseen.thread(f"memconsole-reap-{self.pid}", self._reap).start()

    def _reap(self) -> None:
        self._process.wait()

    def open(self) -> None:
        """Let it become the program.

        Raises:
            GuestError: it is gone.
        """
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        except OSError as error:
            raise GuestError(f"process {self.pid} is gone", str(error), "see its log") from None


def _as_user(service: Service) -> dict[str, object]:
    if os.geteuid() or not (service.user or service.group):
        return {"cwd": service.directory}
    groups = [service.group]
    with contextlib.suppress(KeyError):
        groups = os.getgrouplist(pwd.getpwuid(service.user).pw_name, service.group)
    return {"cwd": service.directory, "user": service.user, "group": service.group, "extra_groups": groups}


def tell(name: str, service: Service, live: Process) -> None:
    """Have it save: its command is waited for, then it is told to end, which is not.

    Raises:
        GuestError: its command failed, or took too long; it was not told to end. Gone: it ended.
    """
    if service.save:
        _run(service, service.save, service.within, f"service {name} did not save")
    number = signal_of(service.save_signal) or signal.SIGTERM
    if service.unit:
        units.stop(service.unit, number, service.within)
    else:
        live.tell(number)


def await_ready(name: str, service: Service, live: Process, log: Path) -> None:
    """Wait until it answers, by its own command; without one, it is taken at its word.

    Raises:
        GuestError: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + service.within
    while True:
        if live.ends(0 if service.ready else _LOOK_S):
            raise GuestError(f"service {name} ended as soon as it was started", last_words(log), f"see {log}")
        if not service.ready:
            return
        left = deadline - time.monotonic()
        with contextlib.suppress(GuestError):
            _run(service, service.ready, max(_LOOK_S, left), f"service {name} is not ready")
            return
        if left <= 0:
            why = f"`{service.ready}` does not succeed within {service.within:g} s"
            raise GuestError(f"service {name} is not ready", why, f"it runs; see {log}")
        live.ends(_LOOK_S)


def _run(service: Service, line: str, within: float, what: str) -> None:
    """Run a line for /bin/sh as the service's user.

    Raises:
        GuestError: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within,
            check=False,
            **_as_user(service),  # type: ignore[call-overload]
        )
    except subprocess.TimeoutExpired:
        raise GuestError(what, f"`{line}` takes longer than {within:g} s", "give it more time: --within") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestError(what, f"`{line}`: {error}", "run it by hand to see why") from None
    if done.returncode:
        said = done.stderr.strip()[-400:] or done.stdout.strip()[-400:] or "it said nothing"
        raise GuestError(what, f"`{line}` ended with {done.returncode}: {said}", "run it by hand to see why")
