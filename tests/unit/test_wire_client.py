"""A client against a service that does not keep to the protocol: every fault by its name, and nothing is left open."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.controls import runtime_dir
from support.open_fds import nothing_stays_open
from support.synthetic import snapshot
from support.waiting import LONG_S

from memconsole import action_input
from memconsole import actions as do
from memconsole.backend.wire import client as client_module
from memconsole.backend.wire.client import Client
from memconsole.errors import Denied, MemconsoleError, NoControl, NotFound, UsageError, WireError
from memconsole.model import Part

GREETING = {"protocol": 1, "version": "0", "label": "a service", "role": "operator", "read_only": ""}
Script = Callable[[socket.socket, str, dict[str, Any]], None]


def says(parameters: object = None, *, error: str = "", fds: tuple[int, ...] = (), more: bool = False) -> Script:
    """Answer a call with this."""
    reply: dict[str, object] = {"parameters": parameters or {}}
    if error:
        reply["error"] = error
    if more:
        reply["continues"] = True

    def answer(sock: socket.socket, _method: str, _parameters: dict[str, Any]) -> None:
        socket.send_fds(sock, [json.dumps(reply).encode() + b"\0"], fds)

    return answer


def raw(data: bytes) -> Script:
    return lambda sock, _method, _parameters: sock.sendall(data)


def hangs_up(sock: socket.socket, _method: str, _parameters: dict[str, Any]) -> None:
    sock.shutdown(socket.SHUT_RDWR)


class Service:
    """A service that greets, and answers every other call as a test says; ``calls`` is what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answer: Script = says()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(0)  # one may wait to be let in
        self._socks: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        threads = []
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                break
            self._socks.append(sock)
            threads.append(threading.Thread(target=self._talk, args=(sock,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _talk(self, sock: socket.socket) -> None:
        inbox = b""
        with suppress(OSError):
            while data := sock.recv(65536):
                inbox += data
                while b"\0" in inbox:
                    message, _, inbox = inbox.partition(b"\0")
                    call = json.loads(message)
                    method = call["method"].rpartition(".")[2]
                    if method == "Hello":
                        says(GREETING)(sock, method, {})
                    else:
                        self.calls.append((method, call["parameters"]))
                        self.answer(sock, method, call["parameters"])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._socks:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in self._socks:
            sock.close()


@pytest.fixture
def service() -> Iterator[Service]:
    with runtime_dir() as directory, closing(Service(directory / "control")) as made:
        yield made


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with closing(Client(service.path)) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "error", "code"),
    [
        (raw(b"no JSON\0"), WireError, "Wire"),
        (raw(b'{"parameters":{"plan":7}}\0'), WireError, "Wire"),
        (hangs_up, NoControl, "ControlDied"),
        (says(error="io.memconsole.NotFound"), NotFound, "NotFound"),
        (says({"code": "Gone", "what": "web is gone"}, error="io.memconsole.NotFound"), NotFound, "Gone"),
        (says({"code": 7}, error="io.memconsole.NotFound"), WireError, "Wire"),
        (says({"what": "new"}, error="io.memconsole.OfANewerVersion"), MemconsoleError, "OfANewerVersion"),
        (says({"parameter": "gpa"}, error="org.varlink.service.InvalidParameter"), UsageError, "InvalidParameter"),
        (says({"method": "Plan"}, error="org.varlink.service.MethodNotFound"), WireError, "ProtocolVersion"),
        (says(error="org.varlink.service.MethodNotFound"), WireError, "ProtocolVersion"),
    ],
)
def test_an_answer_that_is_none_is_named(
    client: Client, service: Service, answer: Script, error: type[MemconsoleError], code: str
) -> None:
    service.answer = answer
    with pytest.raises(error) as raised:
        client.plan(do.Release("web"))
    assert raised.value.code == code
    assert service.calls == [("Plan", {"action": action_input.encode(do.Release("web"))})]


def test_an_action_is_sent_once_however_it_ends(client: Client, service: Service) -> None:
    service.answer = hangs_up
    with pytest.raises(NoControl, match="went away during Apply") as raised:
        client.apply(do.Release("web"))
    assert "wholly done or wholly not" in raised.value.remedy
    assert [method for method, _ in service.calls] == ["Apply"]


def test_a_service_that_does_not_answer_in_time_is_named(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "READ_S", 0.01)
    service.answer = lambda *_: None
    with pytest.raises(NoControl) as raised:
        client.plan(do.Release("web"))
    assert raised.value.code == "NoAnswer"


def test_an_endless_answer_is_not_read_for_ever(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_REPLY", 1 << 16)
    service.answer = raw(b"x" * (1 << 20))
    with pytest.raises(WireError, match="an endless answer to Plan"):
        client.plan(do.Release("web"))


def test_what_is_left_of_an_answer_is_not_taken_for_the_next(client: Client, service: Service) -> None:
    service.answer = raw(b'{"parameters":{"times":[1]}}\0{"parameters":{"times":[2]}}\0')
    assert list(client.history()) == [1]
    service.answer = says({"times": [3]})
    assert list(client.history()) == [3], "the connection with something left on it was closed"


# --- descriptors --------------------------------------------------------------------------------------------------


def test_descriptors_that_nobody_asked_for_are_closed(client: Client, service: Service) -> None:
    with Path(os.devnull).open("rb") as file:
        service.answer = says({"times": []}, fds=(file.fileno(),))
        client.history()
        with nothing_stays_open():
            client.history()


def test_a_table_that_did_not_come_is_named(client: Client, service: Service) -> None:
    service.answer = says({"fd": 0})
    with pytest.raises(WireError, match="the answer has no table"):
        client.extents("region:web")


def test_the_descriptors_of_a_region_come_in_order_or_not_at_all(client: Client, service: Service) -> None:
    with Path(os.devnull).open("rb") as file:
        fds = (file.fileno(), file.fileno())
        service.answer = says({"fds": [0, 1]}, fds=fds)
        found = client.open_region("web")
        assert len(found) == 2
        for fd in found:
            os.close(fd)
        service.answer = says({"fds": [0, 1, 2]}, fds=fds)
        with nothing_stays_open(), pytest.raises(WireError, match="the answer lacks segments"):
            client.open_region("web")


# --- snapshots ----------------------------------------------------------------------------------------------------


def test_a_service_that_knows_no_parts_gives_a_snapshot_without(client: Client, service: Service) -> None:
    body = json.loads(msgspec.json.encode(snapshot(1, 1)))

    def older(sock: socket.socket, method: str, parameters: dict[str, Any]) -> None:
        if "parts" in parameters:
            says({"parameter": "parts"}, error="org.varlink.service.InvalidParameter")(sock, method, parameters)
        else:
            says({"generation": 1, "snapshot": body})(sock, method, parameters)

    service.answer = older
    assert client.snapshot((Part.PLACEMENT,)).host == snapshot(1, 1).host
    assert client.snapshot((Part.PLACEMENT,)).host == snapshot(1, 1).host
    assert ["parts" in parameters for _, parameters in service.calls] == [True, False, False], "it is not asked again"


def test_parts_that_are_refused_for_another_reason_are_an_error(client: Client, service: Service) -> None:
    service.answer = says({"code": "BadPart", "what": "there is no such part"}, error="io.memconsole.UsageError")
    with pytest.raises(UsageError, match="no such part"):
        client.snapshot((Part.PLACEMENT,))


def test_a_snapshot_that_is_said_to_be_known_and_is_not_is_an_error(client: Client, service: Service) -> None:
    service.answer = says({"generation": 1})
    with pytest.raises(WireError, match="the answer has no snapshot"):
        client.snapshot()


def test_a_stream_ends_with_its_last_answer(client: Client, service: Service) -> None:
    event = {"seq": 5, "at_ns": 1, "kind": "made", "subject": "web", "text": "web is there"}
    answers = [says({"events": [event]}, more=True), says({"events": []})]

    def both(sock: socket.socket, method: str, parameters: dict[str, Any]) -> None:
        for answer in answers:
            answer(sock, method, parameters)

    service.answer = both
    assert [each.seq for each in client.follow(0)] == [5]


# --- connecting ---------------------------------------------------------------------------------------------------


def test_a_socket_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(Denied, match="cannot be opened"):
        Client(tmp_path / "control")


@pytest.mark.parametrize("error", [TimeoutError(), BlockingIOError(11, "full"), OSError(5, "Input/output error")])
def test_a_socket_that_takes_no_connection_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket.socket, "connect", fails)
    with pytest.raises(NoControl, match="no control process answers"):
        Client(tmp_path / "control")


def test_connections_beyond_those_kept_are_closed(client: Client, service: Service) -> None:
    service.answer = says({"times": []})
    barrier = threading.Barrier(12, timeout=LONG_S)

    def together(sock: socket.socket, method: str, parameters: dict[str, Any]) -> None:
        barrier.wait()
        says({"times": []})(sock, method, parameters)

    service.answer = together
    threads = [threading.Thread(target=client.history) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(client._idle) == client_module._IDLE
