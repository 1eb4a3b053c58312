"""Varlink as other people's clients speak it: introspection, its errors, order, calls that want no answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import varlink
from support.served import Raw, ServedSource
from support.synthetic import snapshot
from support.waiting import until

import memconsole
from memconsole import actions
from memconsole.backend.wire import protocol
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.serving import RunningService, serve_in_thread

RESERVE = actions.Reserve("fresh", 64 << 20)


@pytest.fixture
def source() -> ServedSource:
    return ServedSource(snapshot(20, 5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control"


@pytest.fixture
def serving(source: ServedSource, path: Path) -> Iterator[RunningService]:
    handle = serve_in_thread(source, path)
    yield handle
    handle.close()


def test_the_varlink_package_introspects_and_calls_everything(
    serving: RunningService, path: Path, source: ServedSource
) -> None:
    with varlink.Client(f"unix:{path}") as client:
        assert client.get_interfaces() == ["org.varlink.service", "io.memconsole", "io.systemd.Metrics"]
        with client.open("org.varlink.service") as service:
            assert service.GetInfo()["product"] == "memconsole"
        with client.open("io.memconsole") as console:
            assert console.Hello(protocol.PROTOCOL)["role"] == "operator"
            shown = console.GetSnapshot()
            assert shown["snapshot"]["regions"][0]["name"] == source.snapshot().regions[0].name
            assert "snapshot" not in console.GetSnapshot(known=shown["generation"])
            assert console.GetExtents(f"region:{source.snapshot().regions[0].name}")["rows"] > 0
            action = {"do": "reserve", "name": "theirs", "size": 4096}
            assert console.Plan(action)["plan"]["effects"]
            assert console.Apply(action)["outcome"]["subject"] == "theirs"
            events = console.Events(0)["events"]
            assert events[-1]["subject"] == "theirs"
            assert console.Watch()["snapshot"]["host"]["name"] == source.snapshot().host.name
            source.recorded = [source.snapshot()]
            assert console.History(0)["times"] == source.history()
            assert console.GetPast(source.history()[0])["snapshot"]["taken_ns"] == source.history()[0]
            assert {found["level"] for found in console.Doctor()["capabilities"]} <= {"yes", "partly", "no"}
            with pytest.raises(varlink.VarlinkError) as caught:
                console.GetExtents("region:nowhere")
            assert caught.value.error() == "io.memconsole.NotFound"
            with pytest.raises(varlink.VarlinkError):
                console.OpenRegion("synthetic")
            assert caught.value.parameters()["code"] == "NotFound"
        with client.open("io.memconsole") as console:
            pieces = console.Watch(250, _more=True)
            assert next(pieces)["snapshot"]
            source.show(snapshot(20, 5, beats=9))
            assert next(pieces)["changes"]["changed"]["guests"]
        with client.open("io.memconsole") as console:
            news = console.Events(source.events(0)[-1].seq, _more=True)
            with contextlib.closing(Client(path)) as ours:
                ours.apply(RESERVE)
            assert next(news)["events"][0]["subject"] == "fresh"


def test_the_errors_of_varlink(serving: RunningService, path: Path) -> None:
    def error(method: str, **parameters: Any) -> tuple[str, object]:
        raw.call(method, **parameters)
        reply = raw.receive()
        return reply["error"].removeprefix("org.varlink.service."), next(iter(reply["parameters"].values()))

    with Raw(path) as raw:
        assert error("io.memconsole.Fly") == ("MethodNotFound", "io.memconsole.Fly")
        assert error("org.varlink.service.Fly") == ("MethodNotFound", "org.varlink.service.Fly")
        assert error("org.example.Fly") == ("InterfaceNotFound", "org.example")
        assert error("nothing") == ("InterfaceNotFound", "nothing")
        assert error("org.varlink.service.GetInterfaceDescription", interface="x.y") == ("InterfaceNotFound", "x.y")
        assert error("io.memconsole.GetExtents") == ("InvalidParameter", "key")
        assert error("io.memconsole.GetExtents", key=7) == ("InvalidParameter", "key")
        assert error("io.memconsole.GetExtents", key="region:a", colour=1) == ("InvalidParameter", "colour")
        release = {"do": "release", "region": "a"}
        assert error("io.memconsole.Plan", action=release, after=[release] * 257) == ("InvalidParameter", "after")
        assert error("io.memconsole.Plan", action={"do": "fly"})[0] == "io.memconsole.UsageError"
        raw.call("org.varlink.service.GetInfo")
        assert raw.receive()["parameters"]["vendor"] == "memconsole"


def test_calls_on_a_connection_are_answered_in_order_and_oneway_ones_not(
    serving: RunningService, path: Path, source: ServedSource
) -> None:
    with Raw(path) as raw:
        raw.call("io.memconsole.Apply", oneway=True, action={"do": "reserve", "name": "a", "size": 4096})
        raw.call("io.memconsole.Plan", action={"do": "release", "region": "a"})
        raw.call("org.varlink.service.GetInfo")
        raw.call("io.memconsole.Events", after=0)
        assert raw.receive()["parameters"]["plan"]["action"] == "release"
        assert "vendor" in raw.receive()["parameters"]
        assert raw.receive()["parameters"]["events"][-1]["subject"] == "a"


def test_a_call_that_came_while_one_before_it_was_done_is_heard_after_one_that_is_answered_at_once(
    serving: RunningService, path: Path, source: ServedSource
) -> None:
    source.hold = threading.Event()
    with Raw(path) as raw, Raw(path) as other:
        reserve = Raw.message("io.memconsole.Apply", action={"do": "reserve", "name": "a", "size": 4096})
        raw.send(reserve + Raw.message("org.varlink.service.GetInfo"))
        until(lambda: source.holding)
        raw.call("io.memconsole.Events", after=0)
        other.call("org.varlink.service.GetInfo")
        assert "vendor" in other.receive()["parameters"]  # so the loop has seen that there is more to read
        source.hold.set()
        assert "outcome" in raw.receive()["parameters"]
        assert "vendor" in raw.receive()["parameters"]
        assert raw.receive()["parameters"]["events"][-1]["subject"] == "a"


def test_oneway_calls_of_a_client_that_left_are_done(serving: RunningService, path: Path, source: ServedSource) -> None:
    with Raw(path) as raw:
        for name in "abc":
            raw.call("io.memconsole.Apply", oneway=True, action={"do": "reserve", "name": name, "size": 4096})
    until(lambda: len(source.applied) == 3)


def test_a_client_that_half_closes_is_still_answered(serving: RunningService, path: Path) -> None:
    with Raw(path) as raw:
        raw.call("io.memconsole.Plan", action={"do": "release", "region": "a"})
        raw.sock.shutdown(socket.SHUT_WR)
        assert "plan" in raw.receive()["parameters"]
        assert raw.at_end()


def test_metrics_are_told_as_services_of_systemd_tell_theirs(serving: RunningService, path: Path) -> None:
    with varlink.Client(f"unix:{path}") as client, client.open("io.systemd.Metrics") as metrics:
        families = {each["name"]: each for each in metrics.Describe(_more=True)}
        listed = list(metrics.List(_more=True))
        assert {each["name"] for each in listed} == set(families)
        assert families["io.memconsole.guest_memory_bytes"]["type"] == "gauge"
        assert families["io.memconsole.canary_beats_total"]["type"] == "counter"
        shown = snapshot(20, 5)
        memory = {
            each["object"]: each["value"] for each in listed if each["name"] == "io.memconsole.guest_memory_bytes"
        }
        assert memory == {guest.name: guest.memory for guest in shown.guests}
        build = next(each for each in listed if each["name"] == "io.memconsole.build")
        assert (families[build["name"]]["type"], build["value"]) == ("string", memconsole.__version__)
        assert build["fields"]["kernel"] == shown.host.kernel
        with pytest.raises(varlink.VarlinkError) as refused:
            metrics.List()
        assert refused.value.error() == "org.varlink.service.ExpectedMore"
