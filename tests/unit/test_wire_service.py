"""Client and service face to face: what a Source gives here is what it gives there."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import varlink
from support.open_fds import nothing_stays_open
from support.served import Raw, ServedSource
from support.synthetic import snapshot
from support.waiting import LONG_S, until

from memconsole import actions
from memconsole.backend.wire import protocol
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.loop import Limits, Loop
from memconsole.backend.wire.pool import Pool
from memconsole.backend.wire.server import READ_S
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.backend.wire.shared_survey import SharedSnapshot, SharedSurvey
from memconsole.errors import NoControl, NotFound, Refused, UsageError, WireError
from memconsole.extents import ExtentTable
from memconsole.model import Access, Refusal, Rung

RESERVE = actions.Reserve("fresh", 64 << 20)


@pytest.fixture
def source() -> ServedSource:
    return ServedSource(snapshot(20, 5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control"


@pytest.fixture
def serving(source: ServedSource, path: Path) -> Iterator[RunningService]:
    handle = serve_in_thread(source, path, limits=Limits(looked_after_s=0.05))
    yield handle
    handle.close()


@pytest.fixture
def client(serving: RunningService, path: Path) -> Iterator[Client]:
    made = Client(path)
    yield made
    made.close()


# --- a Source over the wire ----------------------------------------------------------------------------------------


def test_a_snapshot_arrives_as_it_was_taken(client: Client, source: ServedSource) -> None:
    assert client.snapshot() == source.snapshot()


def test_extents_arrive_by_fd_and_cannot_be_written(client: Client, source: ServedSource, path: Path) -> None:
    key = f"region:{source.snapshot().regions[0].name}"
    with client.extents(key) as table, source.extents(key) as local:
        assert table.to_bytes() == local.to_bytes()
    with Raw(path) as raw:
        raw.call("io.memconsole.GetExtents", key=key)
        data, fds, _, _ = socket.recv_fds(raw.sock, 4096, 4)
        try:
            reply = msgspec.json.decode(data.rstrip(b"\0"))["parameters"]
            assert len(fds) == 1
            assert reply["fd"] == 0
            assert reply["rows"] > 0
            with pytest.raises(OSError, match=r"Bad file descriptor|not permitted"):
                os.pwrite(fds[0], b"x", 0)
        finally:
            os.close(fds[0])


def test_a_table_is_passed_whole_and_what_is_read_is_a_copy(client: Client, source: ServedSource) -> None:
    made: list[tuple[bytes, int]] = []
    original = source.extents

    def extents(key: str, at_ns: int | None = None) -> ExtentTable:
        table = original(key)
        made.append((table.to_bytes(), os.fstat(table.fd).st_ino))
        return table

    source.extents = extents  # type: ignore[method-assign]
    with client.extents(f"region:{source.snapshot().regions[0].name}") as table:
        ((sent, inode),) = made
        assert table.to_bytes() == sent
        assert os.fstat(table.fd).st_ino != inode


def test_no_descriptor_is_left_on_either_side(client: Client, source: ServedSource) -> None:
    key = f"region:{source.snapshot().regions[0].name}"
    client.extents(key).close()
    client.events(0)  # answered after the service has closed what it sent
    with nothing_stays_open():
        for _ in range(50):
            client.extents(key).close()
            with pytest.raises(NotFound):
                client.extents("region:nowhere")
        client.events(0)


def test_events_that_cannot_be_had_end_the_stream_by_name(client: Client, source: ServedSource) -> None:
    stream = client.follow(10**6)
    source.fail["events"] = NotFound("no events")
    with pytest.raises(NotFound, match="no events"):
        next(stream)
    del source.fail["events"]
    assert client.snapshot() == source.snapshot()


def test_plan_apply_and_events(client: Client, source: ServedSource) -> None:
    assert client.plan(RESERVE) == source.plan(RESERVE)
    last = source.events(0)[-1].seq
    outcome = client.apply(RESERVE)
    assert (outcome.action, outcome.subject) == ("reserve", "fresh")
    assert source.applied == [RESERVE]
    assert source.peers == [f"uid {os.getuid()} pid {os.getpid()}"]
    assert [event.subject for event in client.events(last)] == ["fresh"]


def test_every_action_travels(client: Client, source: ServedSource) -> None:
    todo = [
        actions.Map("web", "db1", gpa=1 << 20, access=Access.RO),
        actions.Revoke("g1", within=0.5, at_most=Rung.ASK),
        actions.GuestStart("vm", vmm="qemu", args=("-device", "edu,addr=4")),
    ]
    for action in todo:
        client.apply(action)
    assert source.applied == todo


def test_a_refusal_is_the_one_that_was_raised(client: Client, source: ServedSource) -> None:
    source.refuse = (Refusal("NameTaken", "no", "it is there", "take another"),)
    with pytest.raises(Refused) as caught:
        client.apply(RESERVE)
    assert (caught.value.code, str(caught.value)) == ("NameTaken", "no: it is there (take another)")
    source.fail["extents"] = NotFound("gone")
    with pytest.raises(NotFound):
        client.extents("region:x")


def test_a_fault_of_ours_is_said_and_logged(
    client: Client, source: ServedSource, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oops")

    source.on_snapshot = broken
    with pytest.raises(Exception, match="ZeroDivisionError: oops") as caught:
        client.snapshot()
    assert getattr(caught.value, "code", "") == "Internal"
    assert "ZeroDivisionError" in caplog.text
    source.on_snapshot = lambda: None
    assert client.snapshot() == source.snapshot()


def test_read_only_source_says_so(tmp_path: Path) -> None:
    serving = serve_in_thread(ServedSource(read_only="--read-only was given"), tmp_path / "control")
    client = Client(tmp_path / "control")
    assert client.read_only == "--read-only was given"
    client.close()
    serving.close()


# --- one survey for everybody --------------------------------------------------------------------------------------


def test_many_polls_share_a_survey_and_what_is_known_is_not_sent(client: Client, source: ServedSource) -> None:
    first = client.snapshot()
    end = time.monotonic() + 0.1
    calls = 0
    while time.monotonic() < end:
        assert client.snapshot() is first or source.surveys > 1
        calls += 1
    assert calls > 10
    assert source.surveys <= 2


def test_after_an_action_nobody_sees_the_time_before_it(client: Client, source: ServedSource, path: Path) -> None:
    other = Client(path)
    for number in range(20):
        client.snapshot()
        client.apply(actions.Reserve(f"r{number}", 4096))
        assert other.snapshot().events[-1].subject == f"r{number}"
    other.close()


def test_a_slow_survey_serves_all_who_wait(client: Client, source: ServedSource, path: Path) -> None:
    gate = threading.Event()
    source.on_snapshot = lambda: gate.wait(LONG_S)
    others = [Client(path) for _ in range(8)]
    found: list[object] = []
    threads = [threading.Thread(target=lambda other=other: found.append(other.snapshot())) for other in others]
    for thread in threads:
        thread.start()
    assert client.plan(RESERVE).action == "reserve"  # others are served meanwhile
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert source.surveys == 1
    for other in others:
        other.close()


def test_a_survey_that_hangs_makes_nobody_wait_for_it_or_fail(
    client: Client, source: ServedSource, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memconsole.backend.wire.shared_survey.PATIENCE_S", 0.05)
    monkeypatch.setattr("memconsole.backend.wire.shared_survey.FRESH_S", 0.0)
    gate = threading.Event()
    first = client.snapshot()
    source.on_snapshot = lambda: gate.wait(60)
    others = [Client(path) for _ in range(5)]
    end = time.monotonic() + 60
    while client.snapshot().findings == first.findings:  # which answers for as long as it took
        assert time.monotonic() < end
    found = [other.snapshot() for other in others for _ in range(3)]
    for each in found:
        *before, old = each.findings
        assert (old.id, tuple(before), each.taken_ns) == ("snapshot-old", first.findings, first.taken_ns)
        assert "old: the next one has been under way for" in old.observed
        assert "what was done since" not in old.observed
    assert source.surveys == 1, "the one that hangs has not come to its end, and no other is begun"
    assert client.apply(RESERVE).action == "reserve"
    assert "what was done since is not in it" in client.snapshot().findings[-1].observed
    gate.set()
    source.on_snapshot = lambda: None
    while client.snapshot().findings != first.findings:
        assert time.monotonic() < end
    for other in others:
        other.close()


def test_a_slow_host_is_waited_for_longer_and_longest_for_what_was_just_done() -> None:
    survey = SharedSurvey(Loop(), Pool("test", 1, 1), lambda _: snapshot())

    def taken(took: float, epoch: int) -> SharedSnapshot:
        return SharedSnapshot(1, snapshot(), b"", 0.0, took, epoch)

    quick, slow = survey.patience(taken(0.1, 0)), survey.patience(taken(5.0, 0))
    assert quick < slow
    survey.outdate()
    assert survey.patience(taken(0.1, 0)) > quick
    assert survey.patience(taken(0.1, 1)) == quick
    assert survey.patience(taken(1000.0, 0)) < READ_S


def test_where_there_is_no_snapshot_yet_a_survey_that_hangs_is_waited_for(
    client: Client, source: ServedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memconsole.backend.wire.shared_survey.PATIENCE_S", 0.05)
    monkeypatch.setattr("memconsole.backend.wire.server.READ_S", 0.5)
    gate = threading.Event()
    source.on_snapshot = lambda: gate.wait(60)
    with pytest.raises(Refused) as caught:
        client.snapshot()
    assert caught.value.code == "Deadline"
    gate.set()
    assert client.snapshot() == source.snapshot()


# --- streams --------------------------------------------------------------------------------------------------------


def test_consoles_see_each_others_events(client: Client, source: ServedSource, path: Path) -> None:
    last = source.events(0)[-1].seq
    others = [Client(path) for _ in range(5)]
    streams = [other.follow(last) for other in others]
    client.apply(actions.Reserve("one", 4096))
    assert [next(stream).subject for stream in streams] == ["one"] * 5
    others[0].apply(actions.Reserve("two", 4096))
    assert [next(stream).subject for stream in streams] == ["two"] * 5
    for stream in streams:
        stream.close()
    for other in others:
        other.close()


def test_a_watch_shows_each_change_whole(client: Client, source: ServedSource) -> None:
    watch = client.watch(0.25)
    assert next(watch) == source.snapshot()
    for beats in (5, 6):
        source.show(snapshot(20, 5, beats=beats))
        assert next(watch) == source.snapshot()
    source.show(snapshot(3, 1))
    assert next(watch) == source.snapshot()
    watch.close()


def test_a_stream_ends_with_the_service_by_name(client: Client, serving: RunningService) -> None:
    stream = client.watch(0.25)
    next(stream)
    serving.close()
    with pytest.raises(Refused) as caught:
        list(stream)
    assert caught.value.code == "Ending"


def test_who_leaves_a_stream_is_forgotten(client: Client, serving: RunningService) -> None:
    before = len(serving.loop)
    stream = client.watch(0.25)
    next(stream)
    assert len(serving.loop) == before + 1
    stream.close()
    until(lambda: len(serving.loop) == before)


# --- the end --------------------------------------------------------------------------------------------------------


def test_what_is_under_way_is_answered_before_the_end(
    source: ServedSource, serving: RunningService, path: Path
) -> None:
    source.hold = threading.Event()
    client = Client(path)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(client.apply(RESERVE)))
    thread.start()
    until(lambda: source.holding)
    threading.Timer(0.1, source.hold.set).start()
    serving.close()
    thread.join()
    assert len(results) == 1
    with pytest.raises(NoControl) as caught:
        client.snapshot()
    assert caught.value.code == "NoSocket"
    client.close()


def test_a_call_that_takes_too_long_is_refused_by_name_and_forgotten(
    source: ServedSource, serving: RunningService, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memconsole.backend.wire.server.READ_S", 0.1)
    going_on = threading.Event()
    source.on_snapshot = lambda: going_on.wait(LONG_S)
    with pytest.raises(Refused) as caught:
        client.snapshot()
    assert caught.value.code == "Deadline"
    going_on.set()
    assert client.snapshot() == source.snapshot()
    for _ in range(20):
        client.plan(RESERVE)
    end = time.monotonic() + LONG_S
    while serving.service._held and time.monotonic() < end:
        time.sleep(0.05)
    assert serving.service._held == []


def test_descriptors_that_come_are_not_inherited(client: Client, source: ServedSource) -> None:
    raw, fds = client._call("GetExtents", {"key": f"region:{source.snapshot().regions[0].name}"})
    try:
        assert raw
        assert [os.get_inheritable(fd) for fd in fds] == [False]
    finally:
        for fd in fds:
            os.close(fd)


def test_a_client_finds_a_service_that_came_back(source: ServedSource, path: Path) -> None:
    serving = serve_in_thread(source, path)
    client = Client(path)
    first = client.snapshot()
    serving.close()
    serving = serve_in_thread(source, path)
    assert client.snapshot() == first
    client.close()
    serving.close()


# --- nobody there ---------------------------------------------------------------------------------------------------


def test_no_socket_a_stale_one_and_one_that_does_not_answer(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with pytest.raises(NoControl) as caught:
        Client(path)
    assert (caught.value.code, caught.value.exit_code) == ("NoSocket", 5)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        with pytest.raises(NoControl) as caught:
            Client(path)
        assert caught.value.code == "StaleSocket"


def test_an_answer_that_does_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memconsole.backend.wire.dialing.Line.greets_within", 0.05)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "control"))
        mute.listen()
        with pytest.raises(NoControl) as caught:
            Client(tmp_path / "control")
        assert caught.value.code == "NoAnswer"


def test_versions_that_do_not_match(serving: RunningService, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "PROTOCOL", 99)
    with Raw(path) as raw:
        raw.call("io.memconsole.Hello", protocol=1)
        reply = raw.receive()
    assert reply["error"] == "io.memconsole.WireError"
    assert reply["parameters"]["code"] == "ProtocolVersion"
    assert "1 and 99" in reply["parameters"]["what"]


def test_a_varlink_service_that_is_not_ours(tmp_path: Path) -> None:
    class Foreign(varlink.Service):  # type: ignore[misc]
        pass

    service = Foreign(vendor="v", product="p", version="1", url="u")

    class Handler(varlink.RequestHandler):  # type: ignore[misc]
        pass

    Handler.service = service
    server = varlink.ThreadingServer(f"unix:{tmp_path}/control", Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.raises(WireError) as caught:
        Client(tmp_path / "control")
    assert caught.value.code == "ProtocolVersion"
    server.shutdown()
    server.server_close()
    thread.join()


# --- the socket in the file system ----------------------------------------------------------------------------------


def test_the_socket_and_its_directory_have_their_modes_whatever_the_umask(source: ServedSource, path: Path) -> None:
    old = os.umask(0o077)
    try:
        serving = serve_in_thread(source, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    serving.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced_a_live_one_and_a_file_are_not(source: ServedSource, path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    serving = serve_in_thread(source, path)
    with pytest.raises(Refused) as caught:
        serve_in_thread(source, path)
    assert caught.value.code == "SocketInUse"
    serving.close()
    path.write_text("precious")
    with pytest.raises(Refused) as caught:
        serve_in_thread(source, path)
    assert caught.value.code == "NotASocket"
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_or_a_directory_others_write_to(source: ServedSource, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        serve_in_thread(source, tmp_path / ("x" * 120))
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(Refused) as caught:
        serve_in_thread(source, shared / "control")
    assert caught.value.code == "NotPrivate"
