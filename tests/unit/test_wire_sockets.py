"""The control process's lock and sockets: one of a directory, right from the first moment, never in another's place."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.controls import runtime_dir

from memconsole.backend.wire import sockets
from memconsole.errors import KernelRefused, Refused, UsageError


@pytest.fixture
def directory() -> Iterator[Path]:
    with runtime_dir() as made:
        yield made


def test_a_directory_has_one_control_process_which_is_named(directory: Path) -> None:
    with closing(sockets.Lock(directory / "lock")), pytest.raises(Refused) as refused:
        sockets.Lock(directory / "lock")
    assert (refused.value.code, refused.value.why) == ("AlreadyServing", f"by process {os.getpid()}")
    sockets.Lock(directory / "lock").close()


def test_a_lock_file_that_is_a_link_is_not_followed(directory: Path) -> None:
    (directory / "lock").symlink_to(directory / "elsewhere")
    with pytest.raises(OSError, match="Too many levels"):
        sockets.Lock(directory / "lock")
    assert not (directory / "elsewhere").exists()


def test_a_socket_has_its_mode_once_it_listens(directory: Path) -> None:
    path = directory / "control"
    with sockets.bind(path, 0o640) as made, socket.socket(socket.AF_UNIX) as caller:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        caller.connect(str(path))
        made.accept()[0].close()


def test_a_socket_that_nobody_answers_on_is_replaced(directory: Path) -> None:
    path = directory / "control"
    sockets.bind(path).close()
    before = path.stat().st_ino
    with sockets.bind(path), socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))
    assert path.exists()
    assert before


def test_a_socket_that_somebody_answers_on_is_theirs(directory: Path) -> None:
    path = directory / "control"
    with sockets.bind(path), pytest.raises(Refused) as refused:
        sockets.bind(path)
    assert refused.value.code == "SocketInUse"


def test_what_is_no_socket_is_not_removed(directory: Path) -> None:
    path = directory / "control"
    path.write_text("a file")
    with pytest.raises(Refused) as refused:
        sockets.bind(path)
    assert refused.value.code == "NotASocket"
    assert path.read_text() == "a file"


def test_a_path_that_no_socket_can_have_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        sockets.bind(directory / ("x" * 120))


def test_where_no_socket_can_be_made_the_kernel_is_quoted(directory: Path) -> None:
    with pytest.raises(KernelRefused, match="bind"):
        sockets.bind(directory / "missing" / "control")


def test_a_listener_of_another_kind_is_not_replaced(directory: Path) -> None:
    path = directory / "control"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(KernelRefused, match="connect"):
            sockets.bind(path)
