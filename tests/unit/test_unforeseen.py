"""An exception that was not foreseen ends the one call it belongs to: answered, logged, counted; all else goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.served import Raw, ServedSource
from support.waiting import until

from memconsole import cli, unforeseen
from memconsole.agent import HELLO, Agent, Type, pack
from memconsole.backend.exports.fd import Hub
from memconsole.backend.ledger import trail
from memconsole.backend.ledger.log import Record
from memconsole.backend.observe.survey import Readers
from memconsole.backend.peers.handle import stat
from memconsole.backend.wire import metrics
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.errors import ExitCode, GuestError, MemconsoleError, Refused


class Unforeseen(ZeroDivisionError):
    """What no code expects."""


def fail(*_: object, **__: object) -> None:
    raise Unforeseen("in the test")


@contextlib.contextmanager
def counted(place: str, most: int = 1 << 30) -> Iterator[None]:
    before = unforeseen.counts()[place]
    yield
    assert before < unforeseen.counts()[place] <= before + most


# --- the mechanism ----------------------------------------------------------------------------------------------


def test_a_named_error_stays_what_it_is_and_another_becomes_internal(caplog: pytest.LogCaptureFixture) -> None:
    named = Refused("it is taken")
    assert unforeseen.attempt("this", "job", lambda: 3) == 3
    before = unforeseen.counts()

    def refuse() -> int:
        raise named

    assert unforeseen.attempt("this", "job", refuse) is named
    assert unforeseen.counts() == before
    with counted("job", 1):
        found = unforeseen.attempt("this", "job", fail)
    assert isinstance(found, MemconsoleError)
    assert (found.code, found.what, found.why) == ("Internal", "this failed", "Unforeseen: in the test")
    assert "Traceback" in caplog.text
    assert "in fail" in caplog.text


def test_what_leaves_a_thread_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with counted("thread", 1):
        thread = unforeseen.thread("memconsole-test", fail)
        thread.start()
        thread.join()
    assert "the thread memconsole-test failed" in caplog.text


def test_a_command_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("memconsole.recording.schema", fail)
    assert cli.main(["schema"]) == ExitCode.FAILED
    assert "memconsole: memconsole failed: Unforeseen: in the test" in capsys.readouterr().err


# --- the service ------------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> ServedSource:
    return ServedSource()


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mc-") as directory:
        yield Path(directory) / "control"


@pytest.fixture
def serving(source: ServedSource, path: Path) -> Iterator[RunningService]:
    serving = serve_in_thread(source, path)
    yield serving
    serving.close()
    assert not serving.alive


def ask(path: Path, method: str, **parameters: Any) -> dict[str, Any]:
    with Raw(path) as raw:
        raw.call(f"io.memconsole.{method}", **parameters)
        return raw.receive()


CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "snapshot": ("GetSnapshot", {}, "survey"),
    "extents": ("GetExtents", {"key": "guest:db1"}, "call"),
    "plan": ("Plan", {"action": {"do": "reserve", "name": "a", "size": 4096}}, "call"),
    "apply": ("Apply", {"action": {"do": "reserve", "name": "a", "size": 4096}}, "call"),
    "events": ("Events", {}, "call"),
    "history": ("History", {}, "call"),
    "at": ("GetPast", {"at_ns": 1}, "call"),
    "open_readonly": ("OpenRegion", {"region": "web"}, "call"),
}


@pytest.mark.parametrize("broken", CALLS)
def test_a_call_is_answered_and_the_next_one_served(
    serving: RunningService, source: ServedSource, path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    method, parameters, place = CALLS[broken]
    with monkeypatch.context() as patch, counted(place):
        patch.setattr(ServedSource, broken, fail)
        patch.setattr(source, "on_snapshot", fail if broken == "snapshot" else source.on_snapshot)
        answer = ask(path, method, **parameters)
        assert answer["error"] == "io.memconsole.MemconsoleError"
        assert answer["parameters"]["code"] == "Internal"
        assert "Unforeseen" in answer["parameters"]["why"]
        assert answer["parameters"]["remedy"]
    assert "parameters" in ask(path, "GetSnapshot")
    assert serving.alive


def test_subscribers_are_told_and_those_after_them_served(
    serving: RunningService, source: ServedSource, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Raw(path) as watcher, monkeypatch.context() as patch:
        watcher.call("io.memconsole.Watch", more=True, every_ms=250)
        assert watcher.receive()["continues"]
        patch.setattr("memconsole.backend.wire.delta.between", fail)
        source.show(msgspec.structs.replace(source.snapshot(), taken_ns=1))
        assert watcher.receive()["parameters"]["code"] == "Internal"
    with Raw(path) as watcher:
        watcher.call("io.memconsole.Watch", more=True, every_ms=250)
        assert watcher.receive()["continues"]
        source.show(msgspec.structs.replace(source.snapshot(), taken_ns=2))
        assert "changes" in watcher.receive()["parameters"]
    with monkeypatch.context() as patch:
        with Raw(path) as listener:
            listener.call("io.memconsole.Events", more=True)
            patch.setattr(ServedSource, "events", fail)
            until(lambda: unforeseen.counts()["call"] > 0)
            while "error" not in (said := listener.receive()):
                pass
        assert said["parameters"]["code"] == "Internal"
    assert serving.alive


def test_the_loop_goes_on_whatever_fails_in_a_turn_of_it(
    serving: RunningService, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for broken in ("opened", "closed", "received", "refuse"):
        with monkeypatch.context() as patch, contextlib.suppress(OSError, EOFError):
            patch.setattr(type(serving.service), broken, fail)
            ask(path, "GetSnapshot")
    with counted("loop", 2):
        serving.loop.call(fail)
        serving.loop.call(lambda: serving.loop.later(0, fail))
        until(lambda: unforeseen.counts()["loop"] > 1)
        assert "parameters" in ask(path, "GetSnapshot")
    ran: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("memconsole.backend.wire.loop.Loop._refuse", fail)
        serving.loop.call(lambda: ran.append(1))
        until(lambda: bool(ran))
    assert serving.alive


def test_what_is_done_every_while_is_done_again(serving: RunningService, source: ServedSource) -> None:
    times: list[int] = []

    def each(_: object) -> None:
        times.append(1)
        fail()

    with counted("job"):
        serving.service.each(0.01, each)
        until(lambda: len(times) > 3)
    source.on_snapshot = fail
    before = unforeseen.counts()["survey"]
    until(lambda: unforeseen.counts()["survey"] > before + 2)
    source.on_snapshot = lambda: None
    seen = len(times)
    until(lambda: len(times) > seen)


def test_the_metrics_say_how_many_there_were(
    serving: RunningService, path: Path, monkeypatch: pytest.MonkeyPatch, source: ServedSource
) -> None:
    unforeseen.attempt("this", "job", fail)
    count = unforeseen.counts()["job"]
    assert f'memconsole_unforeseen_total{{place="job"}} {count}\n' in metrics.text(source.snapshot())
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path.with_name("metrics")))
    sock.listen()
    serving.listen(sock, metrics.Endpoint(serving.service))
    monkeypatch.setattr(metrics, "text", fail)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path.with_name("metrics")))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 500 ")


def test_one_reader_that_fails_costs_the_snapshot_no_other() -> None:
    read = Readers()
    with counted("survey", 1):
        assert read("/sys/this", fail, 7) == 7
    assert read("/sys/that", lambda: 8, 7) == 8
    (gap,) = read.gaps
    assert (gap.source, gap.why) == ("/sys/this", "Unforeseen: in the test")


# --- the audit trail --------------------------------------------------------------------------------------------


def test_the_audit_trail_goes_on_and_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = trail.AuditTrail(tmp_path / "audit.db", "chain", "boot")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trail, "time_of", fail)
            written.note(Record(1, 1, b"{}"))
            written.flush()
        assert [finding.id for finding in written.findings()] == ["audit-behind"]
        written.note(Record(2, 1, b"{}"))
        written.flush()
        assert [entry.seq for entry in written.entries()] == [2]
    finally:
        written.close()


# --- the agents' thread -----------------------------------------------------------------------------------------


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mc-") as path:
        yield Path(path)


def test_out_of_descriptors_the_agents_socket_waits_and_then_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memconsole.backend.exports.fd._AGAIN_S", 0.05)
    hub = Hub(directory / "agents")
    kept, limit = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        hub.register("me", os.getpid(), stat(os.getpid())[1])
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        used = sum(1 for _ in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, limit[1]))
        with contextlib.suppress(OSError):
            while True:
                kept.append(os.dup(0))
        client.connect(str(directory / "agents"))
        client.send(pack(Type.HELLO, 0, HELLO.pack(0, 0)))
        spent = time.process_time()
        time.sleep(1)
        assert time.process_time() - spent < 0.5, "it spins"
    finally:
        for fd in kept:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    try:
        assert hub.connected("me", 60)
    finally:
        client.close()
        hub.close()


def test_the_agents_thread_goes_on_and_tells_again_what_could_not_be_noted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memconsole.backend.exports.fd._AGAIN_S", 0.05)
    refusing = True
    told: list[str] = []

    def note(name: str, mapped: frozenset[str]) -> None:
        assert mapped == frozenset()
        if refusing:
            raise Refused("the ledger is full", code="LedgerFull") if len(told) % 2 else Unforeseen("full")
        told.append(name)

    hub = Hub(directory / "agents", on_change=note)
    try:
        hub.register("me", os.getpid(), stat(os.getpid())[1])
        with counted("agents"):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.connect(str(directory / "agents"))
            client.send(pack(Type.HELLO, 0, HELLO.pack(0, 0)))
            assert hub.connected("me", 60)
            until(lambda: unforeseen.counts()["agents"] > 0)
        refusing = False
        until(lambda: told == ["me"])
        client.close()
        until(lambda: not hub.connected("me"))
    finally:
        hub.close()


def test_a_guest_whose_message_fails_is_disconnected_and_the_others_are_not(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(directory / "agents")
    try:
        hub.register("me", os.getpid(), stat(os.getpid())[1])
        with monkeypatch.context() as patch, counted("agents"):
            patch.setattr(Hub, "_greet", fail)
            client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            client.settimeout(60)
            client.connect(str(directory / "agents"))
            client.send(pack(Type.HELLO, 0, HELLO.pack(0, 0)))
            assert client.recv(10) == b""
            client.close()
        with Agent(directory / "agents"):
            assert hub.connected("me", 60)
            assert hub.ask("me", Type.REPORT, 60).status
    finally:
        hub.close()


def test_an_agent_outlives_what_a_control_process_sends(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(directory / "agents")
    try:
        hub.register("me", os.getpid(), stat(os.getpid())[1])
        with Agent(directory / "agents") as agent:
            assert hub.connected("me", 60)
            with monkeypatch.context() as patch:
                failed = threading.Event()

                def broken(*_: object) -> None:
                    failed.set()
                    fail()

                patch.setattr(Agent, "_do", broken)
                with contextlib.suppress(GuestError):
                    hub.ask("me", Type.REPORT, 60)
                assert failed.is_set()
            until(lambda: hub.connected("me"))
            assert agent._thread.is_alive()
    finally:
        hub.close()
