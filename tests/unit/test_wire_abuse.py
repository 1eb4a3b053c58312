"""Clients without manners cost little and disturb nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.open_fds import nothing_stays_open
from support.served import Raw, ServedSource
from support.synthetic import snapshot
from support.waiting import LONG_S, until

from memconsole.backend.peers.peer import ConnectionLimits
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.loop import Limits
from memconsole.backend.wire.pool import Pool
from memconsole.backend.wire.serving import RunningService, serve_in_thread

CROWDED = ConnectionLimits((300, 300, 300), per_user=8)
IMPATIENT = Limits(message=64 << 10, buffered=1 << 20, shares=CROWDED, patience_s=0.5, looked_after_s=0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


PATIENT = dataclasses.replace(IMPATIENT, patience_s=LONG_S)


@pytest.fixture
def limits() -> Limits:
    return IMPATIENT


@pytest.fixture
def serving(path: Path, limits: Limits) -> Iterator[RunningService]:
    handle = serve_in_thread(ServedSource(snapshot(2000, 50)), path, limits=limits)
    yield handle
    handle.close()


def refusal(raw: Raw) -> str:
    reply = raw.receive()
    assert reply["error"] == "io.memconsole.Refused"
    assert raw.at_end()
    return str(reply["parameters"]["code"])


@pytest.mark.parametrize(
    "garbage",
    [b"\0", b"hello\0", b"[]\0", b'{"method":7}\0', b"\xff\xfe\0", b'{"method":"a"\0', b"null\0", b"[" * 5000 + b"\0"],
)
def test_garbage_is_named_and_hung_up_on(serving: RunningService, path: Path, garbage: bytes) -> None:
    with Raw(path) as raw:
        raw.send(garbage)
        assert refusal(raw) == "NotVarlink"


def test_a_huge_message_is_named_and_hung_up_on(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        with contextlib.suppress(BrokenPipeError):
            for _ in range(64):
                raw.send(b"x" * 65536)
        assert refusal(raw) == "TooLarge"


def test_half_a_message_is_waited_for_and_not_for_ever(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        raw.send(b'{"method":')
        time.sleep(0.1)
        raw.send(b'"org.varlink.service.GetInfo"}\0{"method')
        assert raw.receive()["parameters"]["vendor"] == "memconsole"
        assert refusal(raw) == "Unfinished"


def test_a_message_byte_by_byte_is_heard(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        for byte in b'{"method":"org.varlink.service.GetInfo"}\0':
            raw.send(bytes([byte]))
        assert raw.receive()["parameters"]["vendor"] == "memconsole"


def test_half_messages_of_all_together_are_bounded(serving: RunningService, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        raws = [stack.enter_context(Raw(path)) for _ in range(40)]
        for raw in raws:
            with contextlib.suppress(BrokenPipeError):
                raw.send(b"x" * 50_000)
        codes = [refusal(raw) for raw in raws]
    assert set(codes) == {"Busy", "Unfinished"}
    assert codes.count("Unfinished") * 50_000 <= IMPATIENT.buffered


def test_who_does_not_read_is_dropped(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        for _ in range(20):
            raw.call("io.memconsole.GetSnapshot")
        end = time.monotonic() + LONG_S
        while not len(serving.loop) and time.monotonic() < end:
            time.sleep(0.001)
        assert len(serving.loop) == 1
        while len(serving.loop) and time.monotonic() < end:
            time.sleep(0.02)
        assert not len(serving.loop)


@pytest.mark.parametrize("limits", [PATIENT], ids=["patient"])
def test_who_reads_slowly_gets_everything(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(3):
            raw.call("io.memconsole.GetSnapshot")
        for _ in range(3):
            time.sleep(0.2)
            assert len(raw.receive()["parameters"]["snapshot"]["regions"]) == 2000


def test_two_hundred_without_manners_and_one_more(serving: RunningService, path: Path) -> None:
    with nothing_stays_open(), contextlib.ExitStack() as stack:
        client = stack.enter_context(contextlib.closing(Client(path)))
        raws = [stack.enter_context(Raw(path)) for _ in range(200)]
        for number, raw in enumerate(raws):
            with contextlib.suppress(BrokenPipeError):
                if number % 4 == 0:
                    raw.send(os.urandom(1000) + b"\0")
                elif number % 4 == 1:
                    raw.send(b'{"method":"io.memconsole.GetSn')
                elif number % 4 == 2:
                    raw.send(b"y" * 200_000)
        assert len(client.snapshot().regions) == 2000
        newcomer = stack.enter_context(contextlib.closing(Client(path)))
        assert len(newcomer.snapshot().regions) == 2000
        until(lambda: len(serving.loop) == 52, "the silent ones may stay")


def test_more_connections_than_may_be_are_told_so(serving: RunningService, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CROWDED.ranks[-1]):
            stack.enter_context(Raw(path))
        late = stack.enter_context(Raw(path))
        assert refusal(late) == "TooManyClients"


def test_a_fault_in_a_job_does_not_end_its_thread(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool("test", 1, 1)
    done: list[int] = []
    assert pool.submit(lambda: done.append(1 // 0))
    while not caplog.text:
        time.sleep(0.001)
    assert pool.submit(lambda: done.append(1))
    pool.close(5)
    assert done == [1]
    assert "ZeroDivisionError" in caplog.text
