"""A console on a terminal of its own: however it is ended, its embedded guests end with it; several start at once."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.services import MEMCONSOLE
from support.waiting import LONG_S, until

from memconsole import actions
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.embedded import embedded
from memconsole.backend.wire.client import Client
from memconsole.errors import Gone, MemconsoleError
from memconsole.model import GuestState

M = 1 << 20

CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A process on a pseudoterminal, whose output is read; where that does not control it, its end sends no signal."""

    def __init__(self, command: list[str], *, controls: bool = True) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, *command] if controls else command,
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color"},
        )  # fmt: skip
        os.close(slave)
        self.said = bytearray()
        self._over = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        with contextlib.suppress(OSError):
            while not self._over.is_set():
                if poll.poll(50):
                    self.said += os.read(self.master, 1 << 16)

    def hang_up(self) -> None:
        """Close the terminal, as a window that is closed or an ssh that breaks does."""
        if not self._over.is_set():
            self._over.set()
            self._reader.join()
            os.close(self.master)

    def clean(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LONG_S)
        self.hang_up()


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="mc-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.clean()


def answering(path: Path) -> Client:
    found: list[Client] = []

    def answers() -> bool:
        with contextlib.suppress(MemconsoleError):
            found.append(Client(path))
        return bool(found)

    until(answers, "the console answers")
    return found[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def console(directory: Path) -> list[str]:
    return [*MEMCONSOLE, "--socket", str(directory / "run" / "control")]


@pytest.mark.parametrize("how", ["SIGHUP", "SIGTERM", "closed terminal", "closed terminal, no signal", "SIGHUP twice"])
def test_guests_end_with_their_console(directory: Path, terminals: list[Terminal], how: str) -> None:
    terminal = Terminal(console(directory), controls=how != "closed terminal, no signal")
    terminals.append(terminal)
    with contextlib.closing(answering(directory / "run" / "control")) as client:
        client.apply(actions.GuestStart("canary", memory=4 * M))
        (guest,) = [guest for guest in client.snapshot().guests if guest.name == "canary"]
        assert guest.state is GuestState.RUNNING
        begun = client.snapshot().taken_ns
        until(lambda: bool(client.history(begun)), "the console records")
        # The newest record may be of the moment in which the guest ran and the ledger did not have it yet.
        until(
            lambda: (
                [each.name for each in client.at(client.history()[-1]).guests if each.pid == guest.pid] == ["canary"]
            ),
            "the console records it as its own",
        )
    assert guest.pid is not None
    until(lambda: b"canary" in terminal.said or b"live" in terminal.said, "the console shows something")
    if how.startswith("closed"):
        terminal.hang_up()
    else:
        number = signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP
        terminal.process.send_signal(number)
        if how == "SIGHUP twice":
            terminal.process.send_signal(number)
    status = terminal.process.wait(LONG_S)
    assert status == 128 + (signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP), terminal.said[-2000:]
    assert not alive(guest.pid)
    assert not (directory / "run" / "control").exists()
    assert list(Path("/run").glob(f"memconsole-{terminal.process.pid}-*")) == []


def test_guests_end_with_a_console_that_is_killed_and_so_does_its_directory(
    directory: Path, terminals: list[Terminal]
) -> None:
    terminal = Terminal(console(directory))
    terminals.append(terminal)
    with contextlib.closing(answering(directory / "run" / "control")) as client:
        for name, memory in (("canary", 4 * M), ("other", 8 * M)):
            client.apply(actions.GuestStart(name, memory=memory))
        pids = [guest.pid for guest in client.snapshot().guests if guest.name in {"canary", "other"}]
    assert len(list(Path("/run").glob(f"memconsole-{terminal.process.pid}-*"))) == 1
    terminal.process.kill()
    assert terminal.process.wait(LONG_S) == -signal.SIGKILL
    until(lambda: not any(alive(pid) for pid in pids if pid), "its guests end")
    until(lambda: not list(Path("/run").glob(f"memconsole-{terminal.process.pid}-*")), "its directory goes")


def test_a_guest_that_could_not_be_made_to_end_with_its_console_does_not_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def without(_custody: OwnCustody, pid: int) -> None:
        started.append(pid)
        raise Gone("the guard of guests is gone", "it was killed", "start the console anew")

    monkeypatch.setattr(OwnCustody, "bind", without)
    with contextlib.closing(embedded(directory / "run")) as control:
        with pytest.raises(Gone, match="the guard of guests is gone"):
            control.apply(actions.GuestStart("canary", memory=4 * M))
        assert len(started) == 1
        assert not alive(started[0])
        assert all(guest.name != "canary" for guest in control.snapshot().guests)
        assert not (directory / "run" / "vmm" / "canary").exists()


def shows(terminal: Terminal, text: bytes) -> bool:
    return text in terminal.said


def test_consoles_that_start_at_once_share_one_control_process(directory: Path, terminals: list[Terminal]) -> None:
    terminals += [Terminal(console(directory)) for _ in range(3)]
    with contextlib.closing(answering(directory / "run" / "control")) as client:
        client.apply(actions.Reserve("shared", M))
        for terminal in terminals:
            until(partial(shows, terminal, b"live"), "every console is up")
        served = int((directory / "run" / "serve.lock").read_text())
        assert served in {terminal.process.pid for terminal in terminals}
        assert all(b"cannot reach" not in terminal.said for terminal in terminals)
        for terminal in terminals:
            os.write(terminal.master, b"2")
            until(partial(shows, terminal, b"shared"), "every console sees the region")


def test_a_second_console_does_not_disturb_the_socket_of_the_first(directory: Path, terminals: list[Terminal]) -> None:
    path = directory / "run" / "control"
    terminals.append(Terminal(console(directory)))
    answering(path).close()
    inode = path.stat().st_ino
    terminals.append(Terminal([*console(directory), "--embedded"]))
    until(lambda: b"is served already" in terminals[1].said, "the second says why it cannot be reached")
    terminals[1].process.send_signal(signal.SIGTERM)
    terminals[1].process.wait(LONG_S)
    assert path.stat().st_ino == inode
    answering(path).close()
