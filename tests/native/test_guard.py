"""The guard of guests, under ASan and UBSan: what it ends, and when it ends nothing."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.keepers import SANITIZERS
from support.waiting import LONG_S, until

SOURCE = Path(__file__).parents[2] / "memconsole" / "native" / "guard.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("guard") / "guard-sanitized"
    subprocess.run([compiler, "-std=gnu11", "-Wall", "-Wextra", "-Werror", *SANITIZERS, "-o", path, SOURCE], check=True)
    return path


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield started
    for each in started:
        each.kill()
        each.wait()


OF_A_TERMINAL = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def ignored(pid: int) -> set[int]:
    """The signals that a process ignores, those that it was started with among them."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")), 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


class Guarded:
    """A guard, and the end of its socket that a control process has."""

    def __init__(self, program: Path, *words: str) -> None:
        self.ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self.process = subprocess.Popen([str(program), *words], stdin=its.fileno(), stderr=subprocess.PIPE)

    def bind(self, pid: int) -> None:
        process = os.pidfd_open(pid)
        socket.send_fds(self.ours, [b"\0"], [process])
        os.close(process)

    def ended(self) -> tuple[int, bytes]:
        self.ours.close()
        _, said = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, said


def test_those_that_were_named_end_with_their_control_process_and_its_directory_goes(
    program: Path, sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    own = tmp_path / "-own"
    (own / "vmm" / "db").mkdir(parents=True)
    guarded = Guarded(program, str(own))
    for each in sleepers[:2]:
        guarded.bind(each.pid)
    assert guarded.ended() == (0, b"")
    assert [each.wait(LONG_S) for each in sleepers[:2]] == [-signal.SIGKILL] * 2
    assert sleepers[2].poll() is None
    assert list(tmp_path.iterdir()) == []


def test_after_an_end_in_good_order_they_go_on(
    program: Path, sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    guarded = Guarded(program, str(tmp_path))
    guarded.bind(sleepers[0].pid)
    guarded.ours.send(b"\0")
    assert guarded.ended() == (0, b"")
    assert sleepers[0].poll() is None
    assert tmp_path.exists()


def test_one_that_ended_is_nothing_to_it_and_more_than_it_can_count_may_come(
    program: Path, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    guarded = Guarded(program)
    process = os.pidfd_open(sleepers[0].pid)
    sleepers[0].kill()
    sleepers[0].wait()
    for _ in range(5000):
        socket.send_fds(guarded.ours, [b"\0"], [process])
    os.close(process)
    guarded.bind(sleepers[1].pid)
    assert guarded.ended() == (0, b"")
    assert sleepers[1].wait(LONG_S) == -signal.SIGKILL


def test_signals_of_a_terminal_do_not_end_it(program: Path, sleepers: list[subprocess.Popen[bytes]]) -> None:
    guarded = Guarded(program)
    guarded.bind(sleepers[0].pid)
    until(lambda: ignored(guarded.process.pid) >= set(OF_A_TERMINAL), "it ignores them")
    for number in OF_A_TERMINAL:
        guarded.process.send_signal(number)
    assert guarded.ended() == (0, b"")
    assert sleepers[0].wait(LONG_S) == -signal.SIGKILL
