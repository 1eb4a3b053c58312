"""Processes as guests: grants through memconsole.agent, hostile peers, and processes that are gone."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support.guests import (
    HUGE,
    AgentProcess,
    collapse,
    given,
    greet,
    hubs,
    hung_up,
    knock,
    mapping_of,
    read,
    region,
    segment_of,
)
from support.open_fds import nothing_stays_open
from support.waiting import LONG_S, until

from memconsole import agent as wire
from memconsole.backend.exports.fd import Hub
from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests.process import ProcessGuest
from memconsole.backend.kernel import procmaps
from memconsole.backend.peers.handle import stat
from memconsole.backend.stores import memfd
from memconsole.errors import Gone, GuestError, NotFound, Refused
from memconsole.model import Access, GuestState

M = 1 << 20


@pytest.fixture
def make_hub() -> Iterator[Callable[[], Hub]]:
    with hubs() as make:
        yield make


@pytest.fixture
def hub(make_hub: Callable[[], Hub]) -> Hub:
    return make_hub()


@pytest.fixture
def database(hub: Hub) -> Iterator[tuple[ProcessGuest, AgentProcess]]:
    with AgentProcess(hub.path) as process:
        guest = ProcessGuest.attach("db", process.pid, hub)
        assert hub.connected("db", 30)
        yield guest, process
        guest.close()


@pytest.fixture
def me(hub: Hub) -> Iterator[str]:
    """This process as a guest, its agent whatever the test sends."""
    hub.register("me", os.getpid(), stat(os.getpid())[1])
    yield "me"
    hub.unregister("me")


def test_a_process_maps_a_grant_and_shares_its_bytes(database: tuple[ProcessGuest, AgentProcess]) -> None:
    guest, process = database
    with region(M) as fd, given(fd, "db-1", M) as offer:
        os.pwrite(fd, b"hello", 0)
        assert guest.agent()
        assert guest.offer(offer, 30)
        assert process.do("read db-1 5") == "hello"
        assert process.do("write db-1 world") == "done"
        assert os.pread(fd, 5, 0) == b"world"
        assert guest.request_unmap("db-1", 30)
        assert process.do("grants") == "none"
        assert os.pread(fd, 5, 0) == b"world"


@pytest.mark.parametrize("access", [Access.RW, Access.RO])
def test_a_process_maps_by_huge_pages(database: tuple[ProcessGuest, AgentProcess], access: Access) -> None:
    guest, process = database
    with region(8 * M) as fd:
        collapse(fd, 8 * M)
        mine = memfd.segment_fd(fd, access)
        for offset in (0, 2 * M, 2 * M + 4096):
            length = 4 * M + 8192
            offer = Offer(f"db-{offset}", mine, offset, length, access, 0)
            assert guest.offer(offer, 30)
            start, mapped = mapping_of(process.pid, segment_of(fd))
            assert mapped == length
            assert (start - offset) % HUGE == 0
            read(process.pid, start, length)
            whole = (offset + length) // HUGE * HUGE - -(-offset // HUGE) * HUGE
            assert procmaps.paged("/", process.pid)[start].huge == whole
            assert guest.request_unmap(offer.grant, 30)
        os.close(mine)


def test_a_read_only_grant_is_read_only(database: tuple[ProcessGuest, AgentProcess]) -> None:
    guest, process = database
    with region(M) as fd, given(fd, "db-1", M, access=Access.RO) as offer:
        assert guest.offer(offer, 30)
        assert process.do("write db-1 world").startswith("refused")
        assert guest.request_unmap("db-1", 30)


def test_a_process_that_uses_the_memory_says_that_it_cannot(database: tuple[ProcessGuest, AgentProcess]) -> None:
    guest, process = database
    with region(M) as fd, given(fd, "db-1", M) as offer:
        assert guest.offer(offer, 30)
        assert process.do("hold db-1") == "done"
        assert not guest.request_unmap("db-1", 30)
        assert process.do("write db-1 still") == "done"
        assert process.do("let-go") == "done"
        assert guest.request_unmap("db-1", 30)


def test_a_grant_too_long_for_its_file_is_refused(database: tuple[ProcessGuest, AgentProcess]) -> None:
    guest, process = database
    with region(M) as fd, given(fd, "db-1", 2 * M) as offer, pytest.raises(GuestError, match="db-1"):
        guest.offer(offer, 30)
    assert process.do("grants") == "none"


def test_a_grant_waits_for_an_agent_that_comes_later(hub: Hub) -> None:
    mine = ProcessGuest.attach("db", os.getpid(), hub)
    with region(M) as fd, given(fd, "db-1", M) as offer, given(fd, "db-2", M) as never:
        assert not mine.agent()
        assert not mine.offer(offer, 1)
        assert not mine.offer(never, 1)
        # Never sent, so there is nothing to unmap.
        assert mine.request_unmap("db-2", 1)
        with wire.Agent(hub.path) as agent:
            assert agent.wait("db-1", LONG_S).writable
            until(lambda: hub.mapped("db") == {"db-1"}, "the answer")
            assert set(agent.grants) == {"db-1"}
    mine.close()


def test_an_agent_comes_back_to_a_new_control_process_with_what_it_has(make_hub: Callable[[], Hub]) -> None:
    first = make_hub()
    with AgentProcess(first.path) as process, region(M) as fd, given(fd, "db-1", M) as offer:
        guest = ProcessGuest.attach("db", process.pid, first)
        assert first.connected("db", 30)
        assert guest.offer(offer, 30)
        guest.close()
        second = make_hub()
        assert process.do("write db-1 alone") == "done"
        adopted = ProcessGuest.adopt("db", process.pid, guest.start_ticks, second, [offer])
        assert second.connected("db", 30)
        until(lambda: second.mapped("db") == {"db-1"}, "HELLO")
        assert adopted.request_unmap("db-1", 30)
        adopted.close()
        assert process.finish() == 0


def test_the_agent_lets_its_process_refuse() -> None:
    with hubs() as make:
        hub = make()
        guest = ProcessGuest.attach("db", os.getpid(), hub)
        asked = []

        def refuse(grant: wire.MappedGrant) -> None:
            asked.append(grant.id)
            if len(asked) == 1:
                raise RuntimeError("not now")

        with wire.Agent(hub.path, on_unmap=refuse) as agent, region(M) as fd, given(fd, "db-1", M, gpa=None) as offer:
            assert hub.connected("db", 30)
            assert guest.offer(offer, 30)
            assert agent.grants["db-1"].gpa is None
            assert not guest.request_unmap("db-1", 30)
            assert guest.request_unmap("db-1", 30)
            assert asked == ["db-1", "db-1"]
        guest.close()


def test_pause_resume_kill_and_gone(hub: Hub) -> None:
    with AgentProcess(hub.path) as process:
        guest = ProcessGuest.attach("db", process.pid, hub)
        guest.pause()
        until(lambda: guest.state() is GuestState.PAUSED, "a stop")
        guest.resume()
        until(lambda: guest.state() is GuestState.RUNNING, "going on")
        assert guest.progress() is None
        guest.stop(1)
        assert guest.state() is GuestState.RUNNING
        guest.kill()
        assert guest.state() is GuestState.GONE
        with pytest.raises(Gone):
            guest.pause()
        guest.close()
        assert process.end() == -9
        with pytest.raises(Gone):
            ProcessGuest.attach("db", process.pid, hub)
    for pid in (0, -1, 1 << 30):
        with pytest.raises(Gone):
            ProcessGuest.attach("db", pid, hub)


def test_a_name_and_a_process_are_one_guest_each(hub: Hub, me: str) -> None:
    with pytest.raises(Refused) as caught:
        ProcessGuest.attach("other", os.getpid(), hub)
    assert caught.value.code == "NameTaken"
    with AgentProcess(hub.path) as process, pytest.raises(Refused):
        ProcessGuest.attach(me, process.pid, hub)
    with pytest.raises(NotFound):
        hub.request_unmap("nobody", "g", 1)


def test_a_process_that_is_no_guest_is_turned_away(hub: Hub) -> None:
    with knock(hub.path) as connection:
        assert hung_up(connection)


def test_another_start_time_is_another_process(hub: Hub) -> None:
    hub.register("me", os.getpid(), stat(os.getpid())[1] + 1)
    with knock(hub.path) as connection:
        assert hung_up(connection)
    hub.unregister("me")


def test_a_guests_child_is_not_the_guest(hub: Hub, me: str) -> None:
    script = "import sys, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); "
    script += "print(len(s.recv(100)))"
    said = subprocess.run([sys.executable, "-c", script, str(hub.path)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "0"
    assert not hub.connected(me)


HELLO = wire.pack(wire.Type.HELLO, 0, wire.HELLO.pack(0, 0))
GARBAGE = {
    "nothing": b"",
    "short": b"MC",
    "noise": os.urandom(200),
    "another version": wire.HEAD.pack(wire.MAGIC, 2, 1, 0, 16),
    "a false length": wire.HEAD.pack(wire.MAGIC, 1, 1, 0, 17),
    "too long": wire.HEAD.pack(wire.MAGIC, 1, 1, 0, 9000) + bytes(8984),
    "an answer before HELLO": wire.pack(wire.Type.DONE, 1, bytes(wire.DONE.size)),
    "a HELLO that lies": wire.pack(wire.Type.HELLO, 0, wire.HELLO.pack(0, 60)),
    "a HELLO of nameless grants": wire.pack(wire.Type.HELLO, 0, wire.HELLO.pack(0, 1) + bytes(64)),
    "a HELLO of endless names": wire.pack(wire.Type.HELLO, 0, wire.HELLO.pack(0, 1) + b"x" * 64),
    "a HELLO of no text": wire.pack(wire.Type.HELLO, 0, wire.HELLO.pack(0, 1) + b"\xff".ljust(64, b"\0")),
    "a request": wire.pack(wire.Type.STOP, 1),
}


@pytest.mark.parametrize("packet", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_ends_that_connection_only(
    hub: Hub, me: str, database: tuple[ProcessGuest, AgentProcess], packet: bytes
) -> None:
    guest, process = database
    connection = knock(hub.path)
    if packet:
        connection.send(packet)
    else:
        connection.shutdown(socket.SHUT_WR)
    assert hung_up(connection)
    connection.close()
    with region(M) as fd, given(fd, "db-1", M) as offer:
        assert guest.offer(offer, 30)
        assert process.do("grants") == "db-1"
        assert guest.request_unmap("db-1", 30)
    with knock(hub.path) as again:
        greet(again)
        assert hub.connected(me, 30)


def _take_request(connection: socket.socket) -> wire.Message:
    packet, fds, _, _ = socket.recv_fds(connection, wire.MAX_MESSAGE, 1)
    for each in fds:
        os.close(each)
    return wire.unpack(packet)


@pytest.mark.parametrize(
    "answer",
    [
        wire.pack(wire.Type.DONE, 77, bytes(wire.DONE.size)),
        wire.pack(wire.Type.DONE, 1, bytes(wire.DONE.size - 1)),
        wire.pack(wire.Type.REPORTED, 1, b"\x09" * wire.REPORTED.size),
        HELLO,
    ],
    ids=["to nothing asked", "too short", "of nothing known", "HELLO again"],
)
def test_a_wrong_answer_ends_the_connection_and_the_wait(hub: Hub, me: str, answer: bytes) -> None:
    with knock(hub.path) as connection, region(M) as fd, given(fd, "me-1", M) as offer:
        greet(connection)
        assert hub.connected(me, 30)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(hub.offer, me, offer, 30)
            _take_request(connection)
            connection.send(answer)
            assert isinstance(asking.exception(), GuestError)
        assert hung_up(connection)
    assert not hub.connected(me)


def test_fds_a_guest_sends_are_not_received(hub: Hub, me: str) -> None:
    with nothing_stays_open(), knock(hub.path) as connection, Path(os.devnull).open() as null:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", null.fileno()))]
        connection.sendmsg([HELLO], rights)
        assert hung_up(connection)


def _hand(connection: socket.socket, id: int, body: bytes) -> None:
    """An fd that is no uffd: the hub takes it as it comes."""
    with Path(os.devnull).open() as null:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", null.fileno()))]
        connection.sendmsg([wire.pack(wire.Type.HANDED, id, body)], rights)


@pytest.mark.parametrize("case", ["for nothing", "too short", "nobody asked for", "twice"])
def test_an_uffd_that_should_not_be_ends_the_connection(hub: Hub, me: str, case: str) -> None:
    with nothing_stays_open(), knock(hub.path) as connection, region(M) as fd, given(fd, "me-1", M) as offer:
        greet(connection)
        assert hub.connected(me, 30)
        wants = 0 if case == "nobody asked for" else wire.WANTS_FAULTS
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(hub.offer, me, replace(offer, wants=wants), 30)
            id = _take_request(connection).id
            body = wire.HANDED.pack(5, 0, 0)
            if case == "twice":
                _hand(connection, id, body)
                assert wire.unpack(connection.recv(wire.MAX_MESSAGE)) == (wire.Type.TAKEN, id, b"")
                _hand(connection, id, body)
            else:
                _hand(connection, id + (case == "for nothing"), body[: 8 if case == "too short" else None])
            assert isinstance(asking.exception(), GuestError)
        assert hung_up(connection)
    assert not hub.connected(me)


class Controller:
    """The control process's end of an agent's connection, as the test will have it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.id = 0

    def accept(self) -> list[str]:
        """Take its connection; what it says it holds."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(LONG_S)
        hello = wire.unpack(self.connection.recv(wire.MAX_MESSAGE))
        return [wire.unpack_name(raw) for (raw,) in wire.NAME.iter_unpack(hello.body[wire.HELLO.size :])]

    def send(self, type: wire.Type, body: bytes = b"", fd: int | None = None) -> int:
        self.id += 1
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        self.connection.sendmsg([wire.pack(type, self.id, body)], rights)
        return self.id

    def offer(self, grant: str, fd: int) -> int:
        """Grant what it hands its page faults over for; nobody serves them, and the kernel does in the end."""
        id = self.send(wire.Type.GRANT, wire.GRANT.pack(wire.pack_name(grant), 0, M, 0, 2, wire.WANTS_FAULTS), fd)
        packet, fds, _, _ = socket.recv_fds(self.connection, wire.MAX_MESSAGE, 1)
        for each in fds:
            os.close(each)
        message = wire.unpack(packet)
        if message.type is wire.Type.DONE:
            pytest.skip("this user may have no userfaultfd (vm.unprivileged_userfaultfd)")
        assert (message.type, message.id) == (wire.Type.HANDED, id)
        return id

    def answered(self, id: int) -> int:
        """The status of a request's answer."""
        message = wire.unpack(self.connection.recv(wire.MAX_MESSAGE))
        assert (message.type, message.id) == (wire.Type.DONE, id)
        return int(wire.DONE.unpack(message.body)[0])

    def taken(self, id: int) -> int:
        """Say that an uffd is in custody; what its grant is answered then."""
        self.connection.send(wire.pack(wire.Type.TAKEN, id))
        return self.answered(id)


def test_an_agent_shows_no_grant_whose_uffd_is_not_in_custody(tmp_path: Path) -> None:
    path = str(tmp_path / "agents")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, region(M) as fd:
        listener.settimeout(LONG_S)
        listener.bind(path)
        listener.listen()
        control = Controller(listener)
        with wire.Agent(path) as agent:
            assert control.accept() == []
            control.offer("g", fd)
            assert agent.grants == {}
            control.connection.close()
            assert control.accept() == [], "it gave up what nobody said was taken"
            first = control.offer("g", fd)
            unmap = control.send(wire.Type.UNMAP, wire.pack_name("g"))
            assert control.answered(unmap) == 0
            assert control.taken(first) == errno.ECANCELED
            assert agent.grants == {}
            assert control.taken(control.offer("g", fd)) == 0
            agent.wait("g", LONG_S).memory[:5] = b"hello"
            assert os.pread(fd, 5, 0) == b"hello"
            control.connection.close()
            assert control.accept() == ["g"]
            control.offer("h", fd)
        control.connection.close()


def test_a_guest_that_says_nothing_costs_no_more_than_it_was_given(hub: Hub, me: str) -> None:
    with knock(hub.path) as connection, region(M) as fd, given(fd, "me-1", M) as offer:
        greet(connection)
        assert hub.connected(me, 30)
        with pytest.raises(GuestError, match="said nothing"):
            hub.offer(me, offer, 0.2)
        assert hub.mapped(me) == set()
        # A late answer: it mapped what is not offered any more, and is asked to unmap it.
        late = _take_request(connection)
        connection.send(wire.pack(wire.Type.DONE, late.id, bytes(wire.DONE.size)))
        answer = wire.unpack(connection.recv(wire.MAX_MESSAGE))
        assert answer.type is wire.Type.UNMAP
        assert wire.unpack_name(answer.body) == "me-1"


def test_a_guest_that_does_not_read_cannot_make_us_queue_without_end(hub: Hub, me: str) -> None:
    with knock(hub.path) as connection:
        greet(connection)
        assert hub.connected(me, 30)
        for _ in range(300):
            with pytest.raises(GuestError, match="said nothing"):
                hub.ask(me, wire.Type.REPORT, 0)
        peer = hub._peers[me]
        assert len(peer.asked) <= 256


def test_a_guest_gets_its_own_grants_only(hub: Hub, me: str, database: tuple[ProcessGuest, AgentProcess]) -> None:
    guest, process = database
    with (
        knock(hub.path) as connection,
        region(M) as fd,
        given(fd, "db-1", M) as offer,
        given(fd, "me-1", M) as mine,
    ):
        assert not hub.offer(me, mine, 1)
        greet(connection)
        assert wire.unpack_name(_take_request(connection).body[:64]) == "me-1"
        assert guest.offer(offer, 30)
        assert process.do("grants") == "db-1"
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(wire.MAX_MESSAGE)
        assert guest.request_unmap("db-1", 30)


def test_nothing_is_left_open(make_hub: Callable[[], Hub]) -> None:
    def once() -> None:
        hub = make_hub()
        guest = ProcessGuest.attach("db", os.getpid(), hub)
        with region(M) as fd, given(fd, "db-1", M) as offer, wire.Agent(hub.path):
            assert hub.connected("db", 30)
            assert guest.offer(offer, 30)
        guest.close()
        hub.close()
        hub.close()

    once()
    with nothing_stays_open():
        for _ in range(5):
            once()
