"""``memconsole serve`` as a process: it starts once, says when it is ready, and may end in any way without loss."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.services import Service, services
from support.waiting import LONG_S, until

from memconsole import actions
from memconsole.backend.history.store import History
from memconsole.errors import NotFound
from memconsole.model import GuestState, Snapshot

M = 1 << 20


@pytest.fixture
def service() -> Iterator[Service]:
    with services() as made:
        yield made


def beats(snapshot: Snapshot, name: str) -> int:
    progress = next(guest.progress for guest in snapshot.guests if guest.name == name)
    return progress.beats if progress is not None else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_whatever_ends_it_guests_and_memory_stay(service: Service, number: int) -> None:
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.Reserve("web", 16 * M, prefault=True))
        client.apply(actions.GuestStart("canary", memory=8 * M))
        until(lambda: beats(client.snapshot(), "canary") > 0)
        before = client.snapshot()
    pid = next(guest.pid for guest in before.guests if guest.name == "canary")
    assert pid is not None
    service.guests.add(pid)
    status, err = service.end(number)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0), err
    assert service.path.exists() == (number == signal.SIGKILL)
    service.start()
    with contextlib.closing(service.client()) as client:
        until(lambda: beats(client.snapshot(), "canary") > beats(before, "canary"))
        after = client.snapshot()
        web = {region.name: region for region in after.regions}["web"]
        assert web.segments == {region.name: region for region in before.regions}["web"].segments
        assert web.seen is not None
        assert web.seen.resident == 16 * M
        canary = next(guest for guest in after.guests if guest.name == "canary")
        assert (canary.pid, canary.state) == (pid, GuestState.RUNNING)
        assert canary.progress is not None
        assert canary.progress.wrong == 0
        client.apply(actions.GuestStop("canary"))
        client.apply(actions.Release("web"))


def test_the_background_one_answers_before_the_command_returns(service: Service) -> None:
    words = service.command("serve", "--state-dir", str(service.state), "--record", "0.25")
    assert subprocess.run(words, check=False, capture_output=True, timeout=LONG_S).returncode == 0
    pid = int((service.runtime / "serve.lock").read_text())
    try:
        with contextlib.closing(service.client()) as client:
            assert client.snapshot().host.name
        until(lambda: len(History(service.state / "history").times()) > 1)
        again = subprocess.run(words, check=False, capture_output=True, text=True, timeout=LONG_S)
        assert again.returncode == 3
        assert f"by process {pid}" in again.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
        until(lambda: not service.path.exists())
        until(lambda: not alive(pid))
    assert "stopping" in (service.state / "serve.log").read_text()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_one_on_the_same_state_or_socket_is_refused(service: Service) -> None:
    service.start()
    for words in (
        ["--socket", str(service.directory / "other" / "control"), "serve", "--state-dir", str(service.state)],
        ["--socket", str(service.path), "serve", "--state-dir", str(service.directory / "other-state")],
    ):
        command = [*service.command()[:3], *words, "--foreground"]
        second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONG_S)
        assert second.returncode == 3, second.stderr
        assert "is served already" in second.stderr
    with contextlib.closing(service.client()) as client:
        assert client.snapshot().host.name


def test_a_state_of_a_newer_version_is_left_alone(service: Service) -> None:
    service.state.mkdir(mode=0o700)
    service.start()
    service.end()
    trail = next(path for path in service.state.iterdir() if path.read_bytes()[:6] == b"SQLite")
    with contextlib.closing(sqlite3.connect(trail)) as database:
        database.execute("PRAGMA user_version = 99")
    before = trail.read_bytes()
    process = service.start(wait=False)
    _, err = process.communicate(timeout=LONG_S)
    assert process.returncode == 1
    assert "newer" in err
    assert trail.read_bytes() == before


def test_the_service_manager_is_told(service: Service) -> None:
    address = str(service.directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(LONG_S)
        service.start("--custody", "keeper", env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "300000"}, wait=False)
        assert manager.recv(100) == b"READY=1"
        with contextlib.closing(service.client()):
            assert manager.recv(100) == b"WATCHDOG=1"
            assert manager.recv(100) == b"WATCHDOG=1"
        service.end()
        said = [manager.recv(100)]
        while said[-1] != b"STOPPING=1":
            said.append(manager.recv(100))
            assert said[-2] == b"WATCHDOG=1"


LAUNCHER = """
import os, sys
first, second = int(sys.argv[1]), int(sys.argv[2])
high = [os.dup(first), os.dup(second)]
for fd, source in zip((3, 4), high):
    os.dup2(source, fd)
    os.set_inheritable(fd, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="metrics:control")
os.execv(sys.argv[3], sys.argv[3:])
"""


def test_sockets_of_the_service_manager_are_served_and_stay(service: Service) -> None:
    service.runtime.mkdir()
    with socket.socket(socket.AF_UNIX) as control, socket.socket(socket.AF_UNIX) as metrics:
        control.bind(str(service.path))
        metrics.bind(str(service.runtime / "metrics"))
        control.listen()
        metrics.listen()
        fds = (metrics.fileno(), control.fileno())
        launcher = [sys.executable, "-c", LAUNCHER, *map(str, fds)]
        for _ in range(2):
            service.start(launcher=launcher, pass_fds=fds)
            with contextlib.closing(service.client()) as client:
                assert client.snapshot().host.name
            with socket.socket(socket.AF_UNIX) as http:
                http.connect(str(service.runtime / "metrics"))
                http.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                assert http.recv(15) == b"HTTP/1.1 200 OK"
            assert service.end()[0] == 0
            assert service.path.exists()


def test_a_region_can_be_read_by_fd_and_not_written(service: Service) -> None:
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.Reserve("web", 2 * M))
        (fd,) = client.open_region("web")
        try:
            with mmap.mmap(fd, 2 * M, prot=mmap.PROT_READ) as memory:
                assert memory[:8] == bytes(8)
                seen = next(region.seen for region in client.snapshot().regions if region.name == "web")
                assert seen is not None
                assert seen.mappers == (os.getpid(),)
            for write in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: mmap.mmap(fd, 4096)):
                with pytest.raises(OSError, match=r"denied|Bad file|Invalid"):
                    write()
        finally:
            os.close(fd)
        lent = [event for event in client.events(0) if event.kind == "lent"]
        assert [(event.subject, event.peer) for event in lent] == [("web", f"uid 0 pid {os.getpid()}")]
        with pytest.raises(NotFound):
            client.open_region("nowhere")
        client.apply(actions.Release("web"))
