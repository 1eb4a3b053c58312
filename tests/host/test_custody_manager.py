"""Custody by the service manager: its FD store gives everything back, whole or as it was before."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.custodies import fd_store_works, file_with, get, put
from support.notify import Manager

from memconsole.backend.custody.systemd import SystemdCustody, inherited
from memconsole.errors import Gone, Refused


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    if not fd_store_works():
        pytest.skip("this kernel has no F_DUPFD_QUERY (Linux 6.10)")
    made = Manager(tmp_path)
    yield made
    made.close()


def test_the_service_manager_gives_everything_back(manager: Manager) -> None:
    first = SystemdCustody([], manager.environ)
    put(first, "region:web:0", b"contents", b"old")
    fd, _ = first.get("region:web:0")
    first.put("region:web:0", fd, b"new")
    os.close(fd)
    put(first, "ledger", b"log")
    put(first, "gone", b"")
    first.drop("gone")
    first.close()
    assert len(manager.store) == 4
    again = SystemdCustody(manager.give_back(), manager.environ)
    assert again.names() == ["ledger", "region:web:0"]
    assert get(again, "region:web:0") == (b"contents", b"new")
    assert again.lost == ()
    again.close()


def test_an_entry_of_another_version_is_kept_with_every_file_it_may_name(manager: Manager) -> None:
    first = SystemdCustody([], manager.environ)
    put(first, "a", b"contents", b"payload")
    first.close()
    (entry,) = (fd for name, fd in manager.store if name.startswith("mc.e."))
    os.pwrite(entry, b"MCENTRY2", 0)
    before = sorted(name for name, _ in manager.store)
    again = SystemdCustody(manager.give_back(), manager.environ)
    assert again.names() == []
    (trouble,) = again.troubles()
    assert "another version" in trouble
    assert sorted(name for name, _ in manager.store) == before
    again.close()


@pytest.mark.parametrize("messages", range(1, 5))
def test_killed_between_any_two_messages_the_old_or_the_new_is_given_back(manager: Manager, messages: int) -> None:
    first = SystemdCustody([], manager.environ)
    put(first, "a", b"old", b"old")
    sent = 0
    real = first._notify

    def notify(text: str, fds: list[int] | None = None) -> None:
        nonlocal sent
        sent += 1
        if sent == messages:
            raise Gone("killed here")
        real(text, fds)

    first._notify = notify  # type: ignore[method-assign]
    with pytest.raises(Gone, match="killed here"):
        put(first, "a", b"new", b"new")
    first._notify = real  # type: ignore[method-assign]
    first._barrier()
    again = SystemdCustody(manager.give_back(), manager.environ)
    assert get(again, "a") == ((b"old", b"old") if messages <= 2 else (b"new", b"new"))
    assert len(manager.store) == 2
    again.close()
    first.close()


def test_what_the_manager_lost_is_named(manager: Manager) -> None:
    first = SystemdCustody([], manager.environ)
    put(first, "a", b"x")
    put(first, "b", b"y")
    first.close()
    given = manager.give_back()
    missing = next(entry for entry in given if entry[0].startswith("mc.f."))
    given.remove(missing)
    os.close(missing[1])
    given.append(("mc.e.99", file_with(b"MCENTRY1 but torn")))
    again = SystemdCustody(given, manager.environ)
    assert sorted(again.lost) == ["a", "mc.e.99"]
    assert again.names() == ["b"]
    again.close()


def test_a_full_fd_store_is_refused_before_anything_is_sent(tmp_path: Path, manager: Manager) -> None:
    custody = SystemdCustody([], {**manager.environ, "FDSTORE": "4"})
    put(custody, "a", b"")
    put(custody, "b", b"")
    with pytest.raises(Refused) as caught:
        put(custody, "c", b"")
    assert caught.value.code == "CustodyFull"
    assert len(manager.store) == 4
    custody.close()


def test_without_an_fd_store_it_is_refused_by_name() -> None:
    with pytest.raises(Refused) as caught:
        SystemdCustody([], {"NOTIFY_SOCKET": "/run/systemd/notify"})
    assert caught.value.code == "CustodyMissing"


def test_inherited_fds_have_names_and_are_taken_once() -> None:
    script = (
        "import os; from memconsole.backend.custody.systemd import inherited\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "print([(name, os.read(fd, 9)) for name, fd in inherited()], inherited(), os.get_inheritable(3))"
    )
    fds = [file_with(b"one"), file_with(b"two")]
    for fd in fds:
        os.lseek(fd, 0, 0)

    def place() -> None:
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in fds]
        for n, fd in enumerate(high):
            os.dup2(fd, 3 + n)

    environ = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "control:mc.f.1"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        close_fds=False,
        preexec_fn=place,
        capture_output=True,
        text=True,
        check=False,
    )
    for fd in fds:
        os.close(fd)
    assert ran.stdout == "[('control', b'one'), ('mc.f.1', b'two')] [] False\n", ran.stderr
    assert inherited({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == []
