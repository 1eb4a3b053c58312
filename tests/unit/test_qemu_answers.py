"""A monitor whose answers are JSON of another shape than QEMU's: each is a named error of the guest, and no fault."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.peers.handle import stat
from memconsole.errors import GuestError

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": ""}, "capabilities": []}}
ODD: tuple[object, ...] = (None, True, 7, "x", [], [7], {}, {"status": 7}, [{"capability": 7}])


class FakeMonitor(threading.Thread):
    """A QMP socket that agrees to the handshake and then says the same to everything; ``raw`` stands for the reply."""

    def __init__(self, path: Path, answer: object, raw: str | None = None, greeting: object = GREETING) -> None:
        super().__init__(daemon=True)
        self._answer, self._raw, self._greeting = answer, raw, greeting
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError, ValueError):
                    self._converse(connection)

    def _converse(self, connection: socket.socket) -> None:
        connection.sendall(json.dumps(self._greeting).encode() + b"\r\n")
        while asked := json.loads(connection.recv(4096)):  # the client waits for each answer, and ends no line
            id = {"id": asked["id"]} if "id" in asked else {}
            if asked["execute"] == "qmp_capabilities":
                said = json.dumps({"return": {}, **id})
            else:
                said = self._raw if self._raw is not None else json.dumps({"return": self._answer, **id})
            connection.sendall(said.encode() + b"\r\n")

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()


@contextlib.contextmanager
def asked(directory: Path, answer: object, raw: str | None = None, greeting: object = GREETING) -> Iterator[QemuGuest]:
    """A guest that is this very process, whose monitor is a fake one."""
    monitor = FakeMonitor(directory / "qmp", answer, raw, greeting)
    guest = QemuGuest.adopt("vm", os.getpid(), stat(os.getpid())[1], directory, "g-1")
    try:
        yield guest
    finally:
        guest.close()
        monitor.end()


def save(guest: QemuGuest) -> None:
    fd = os.memfd_create("state")
    try:
        guest.save(fd, 1)
    finally:
        os.close(fd)


QUESTIONS: dict[str, Callable[[QemuGuest], object]] = {
    "state": QemuGuest.state,
    "is_saved": QemuGuest.is_saved,
    "resume": QemuGuest.resume,
    "shares": QemuGuest.shares,
    "vcpus": QemuGuest.vcpus,
    "clocks": QemuGuest.clocks,
    "save": save,
    "restart": lambda guest: guest.restart("state:vm", "region:vm:0"),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", ODD, ids=repr)
def test_an_answer_of_another_shape_is_an_error_of_the_guest_or_an_answer(
    tmp_path: Path, question: str, answer: object
) -> None:
    with asked(tmp_path, answer) as guest, contextlib.suppress(GuestError):
        QUESTIONS[question](guest)


def test_the_error_says_what_was_asked_and_what_is_wrong(tmp_path: Path) -> None:
    with asked(tmp_path, {"status": 7}) as guest, pytest.raises(GuestError) as caught:
        guest.state()
    assert caught.value.what == "the answer of guest vm to query-status cannot be read"
    assert "$.status" in caught.value.why


@pytest.mark.parametrize(
    "raw",
    ["[]", "7", "null", '"x"', '{"return": 1, "error": 2}', '{"error": 7}', '{"error": {"class": 1}}', "{", "\\"],
)
def test_a_reply_of_another_shape_is_an_error_of_the_guest(tmp_path: Path, raw: str) -> None:
    with asked(tmp_path, None, raw) as guest, pytest.raises(GuestError):
        guest.shares()


@pytest.mark.parametrize("greeting", [[], 7, {}, {"QMP": 7}, {"QMP": {}}, {"QMP": {"capabilities": 7, "version": 1}}])
def test_a_greeting_of_another_shape_is_an_error_of_the_guest(tmp_path: Path, greeting: object) -> None:
    with asked(tmp_path, None, None, greeting) as guest, pytest.raises(GuestError):
        guest.shares()
