"""``memconsole serve`` under a service manager: its sockets, its fd store, and its kills."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.controls import raised
from support.notify import Manager
from support.services import Service, services
from support.waiting import LONG_S, until

from memconsole import actions
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.errors import Gone
from memconsole.model import Guest
from memconsole.source import Source

M = 1 << 20

LAUNCHER = """
import os, sys
fds, names = [int(word) for word in sys.argv[1].split(",") if word], sys.argv[2]
high = [os.dup(fd) for fd in fds]
for at, fd in enumerate(high):
    os.dup2(fd, 100 + at)
for at in range(len(fds)):
    os.dup2(100 + at, 3 + at)
    os.set_inheritable(3 + at, True)
os.closerange(3 + len(fds), 400)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture
def service() -> Iterator[Service]:
    with services() as made:
        yield made


@pytest.fixture
def manager(service: Service) -> Iterator[Manager]:
    made = Manager(service.directory)
    yield made
    made.close()


def start(service: Service, manager: Manager, *sockets: tuple[str, int]) -> None:
    """Start a service as the manager does: with its sockets, and with what it stored."""
    stored = manager.give_back()
    given = [*sockets, *stored]
    fds = tuple(fd for _, fd in given)
    names = ":".join(name for name, _ in given)
    try:
        launcher = [sys.executable, "-c", LAUNCHER, ",".join(map(str, fds)), names]
        service.start(env=manager.environ, launcher=launcher, pass_fds=fds)
    finally:
        for _, fd in stored:
            os.close(fd)


def watcher(source: Source) -> Guest:
    return next(guest for guest in source.snapshot().guests if guest.name == "watch")


def test_killed_it_finds_everything_in_the_fd_store_again(service: Service, manager: Manager) -> None:
    service.runtime.mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(service.path))
        control.listen()
        listening = ("control", control.fileno())
        start(service, manager, listening)
        with contextlib.closing(service.client()) as client:
            client.apply(actions.GuestStart("watch", memory=4 * M))
            client.apply(actions.Reserve("web", 2 * M, prefault=True))
            until(lambda: watcher(client).progress is not None, "the canary counts")
            before, guest = client.snapshot(), watcher(client)
        assert guest.pid is not None
        service.guests.add(guest.pid)
        for _ in range(3):
            service.end(signal.SIGKILL)
            start(service, manager, listening)
            with contextlib.closing(service.client()) as client:
                until(lambda: (found := watcher(client)).agent and found.progress is not None, "the canary came back")
                after = client.snapshot()
                assert [region.segments for region in after.regions] == [region.segments for region in before.regions]
                assert raised(after) == []
                found = watcher(client)
                assert found.pid == guest.pid
                assert found.progress is not None
                assert found.progress.wrong == 0
        with pytest.raises(Gone):  # nobody started one
            KeeperCustody(service.runtime / "keeper")
        with contextlib.closing(service.client()) as client:
            client.apply(actions.GuestStop("watch"))
            client.apply(actions.Release("watch"))
            client.apply(actions.Release("web"))
        assert [name for name, _ in manager.store if name.startswith("mc.e.")] != []  # the ledger
        service.end()


def test_what_a_keeper_holds_is_not_left_for_an_empty_fd_store(service: Service, manager: Manager) -> None:
    service.start()
    with contextlib.closing(service.client()) as client:
        client.apply(actions.Reserve("web", M))
    service.end()
    start(service, manager)
    with contextlib.closing(service.client()) as client:
        assert [region.name for region in client.snapshot().regions] == ["web"]
        client.apply(actions.Release("web"))
    assert manager.store == []


def test_systemd_activates_it_with_the_first_call(service: Service) -> None:
    activate = shutil.which("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not installed")
    service.runtime.mkdir()
    launcher = [activate, f"--listen={service.path}", "--fdname=control"]
    service.start(launcher=launcher, wait=False)
    until(service.path.exists, "systemd listens")
    with contextlib.closing(service.client()) as client:
        assert client.snapshot().host.name
    assert service.process is not None
    status, err = service.end()
    assert status == 0, err
    assert service.path.exists()


def test_units_are_understood_by_systemd_and_leave_guests_alone(service: Service) -> None:
    units = Path(__file__).parents[2] / "systemd"
    text = (units / "memconsole.service").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["KillMode"] == "process"
    assert settings["SendSIGKILL"] == "no"
    assert int(settings["FileDescriptorStoreMax"]) >= 4096
    for unit in ("memconsole.service", "memconsole.socket"):
        made = (units / unit).read_text().replace("/usr/bin/memconsole", "/bin/true")
        (service.directory / unit).write_text(made)
    try:
        verified = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *sorted(service.directory.glob("memconsole.*"))],
            check=False, capture_output=True, text=True, timeout=LONG_S,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("systemd-analyze is not installed")
    complaints = [line for line in verified.stderr.splitlines() if "FileDescriptorStorePreserve" not in line]
    assert complaints == []
