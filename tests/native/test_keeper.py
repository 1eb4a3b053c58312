"""The keeper's protocol, message by message, under ASan and UBSan: every request is answered, no garbage moves it."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest
from support import keepers
from support.waiting import LONG_S

PUT, GET, DROP, LIST, STAT, QUIT, JUMP, LAND = range(1, 9)
OK, BAD_MESSAGE, BAD_VERSION, BAD_OP, BAD_NAME, BAD_FDS, TOO_LONG, NOT_FOUND = range(8)
HOLDING, BUSY, NOT_JUMPED, NOT_LANDED = 11, 13, 14, 15
HEAD = struct.Struct("<BBBBHH")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return keepers.build_sanitized(tmp_path_factory.mktemp("keeper"))


@pytest.fixture
def keeper(program: Path) -> Iterator[keepers.Running]:
    with keepers.running(program) as run:
        yield run
        if run.process.poll() is None:
            with Client(run.path) as client:
                client.ask(QUIT, flags=1)
        status, err = run.ended()
        assert (status, err) == (0, "")


class Client:
    """One connection, speaking bytes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(LONG_S)
        self.socket.connect(str(path))
        self.greeting = self.receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive(self) -> tuple[int, int, bytes, list[int], bool]:
        raw, fds, _, _ = socket.recv_fds(self.socket, 65536, 4)
        assert raw, "the keeper closed the connection"
        version, op, code, more, length, zero = HEAD.unpack_from(raw)
        assert (version, zero, len(raw)) == (1, 0, HEAD.size + length)
        return op, code, raw[HEAD.size :], list(fds), bool(more)

    def send(self, message: bytes, fds: Sequence[int] = ()) -> tuple[int, int, bytes, list[int], bool]:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([message], ancillary)
        return self.receive()

    def ask(
        self, op: int, name: bytes = b"", payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> tuple[int, int, bytes, list[int], bool]:
        return self.send(HEAD.pack(1, op, len(name), flags, len(payload), 0) + name + payload, fds)

    def put(self, name: bytes, text: bytes, payload: bytes = b"") -> int:
        fd = os.memfd_create("test")
        os.write(fd, text)
        try:
            return self.ask(PUT, name, payload, [fd])[1]
        finally:
            os.close(fd)

    def get(self, name: bytes) -> tuple[bytes, bytes]:
        _, code, payload, fds, _ = self.ask(GET, name)
        assert code == OK
        text = os.pread(fds[0], 1 << 16, 0)
        os.close(fds[0])
        return text, payload

    def status(self) -> dict[str, int]:
        names = ("pid", "held", "room", "clients", "bytes", "bytes_room", "guards", "zero")
        return dict(zip(names, struct.unpack("<IIIIQQII", self.ask(STAT)[2]), strict=True))


def test_an_fd_comes_back_with_its_payload(keeper: keepers.Running) -> None:
    with Client(keeper.path) as one:
        assert one.greeting[:2] == (0, OK)
        assert one.put(b"region:web", b"contents", b"payload") == OK
    with Client(keeper.path) as two:
        assert two.get(b"region:web") == (b"contents", b"payload")
        assert two.ask(LIST)[2] == b"\x0aregion:web"
        assert two.ask(DROP, b"region:web")[1] == OK
        assert two.ask(GET, b"region:web")[1] == NOT_FOUND
        assert two.ask(DROP, b"region:web")[1] == NOT_FOUND
        assert two.status()["held"] == 0
        assert two.status()["bytes"] == 0


def test_put_replaces_and_leaks_nothing(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        client.put(b"a", b"first", b"x" * 4096)
        before = keeper.open_files()
        for n in range(100):
            assert client.put(b"a", b"%d" % n, b"y" * n) == OK
        assert keeper.open_files() == before
        assert client.get(b"a") == (b"99", b"y" * 99)
        assert client.status()["held"] == 1


def test_the_longest_name_and_payload_fit(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        assert client.put(b"n" * 255, b"c", b"p" * 4096) == OK
        assert client.get(b"n" * 255) == (b"c", b"p" * 4096)


def test_names_are_listed_in_pages_and_in_order(keeper: keepers.Running) -> None:
    names = {b"%d-" % n + b"x" * (n % 240) for n in range(300)} | {b"\xff\xfe", b"a", b"aa"}
    with Client(keeper.path) as client:
        for name in random.Random(1).sample(sorted(names), len(names)):
            assert client.put(name, b"") == OK
        listed, last, more, pages = [], b"", True, 0
        while more:
            _, code, page, _, more = client.ask(LIST, last)
            assert code == OK
            while page:
                last, page = page[1 : 1 + page[0]], page[1 + page[0] :]
                listed.append(last)
            pages += 1
        assert listed == sorted(names)
        assert pages > 5


FD = os.open("/dev/null", os.O_RDONLY)
BAD = {
    "empty with an fd": (b"", [FD], BAD_MESSAGE),
    "one byte": (b"\1", [], BAD_MESSAGE),
    "half a header": (b"\1\1\1\0", [], BAD_MESSAGE),
    "another version": (HEAD.pack(2, STAT, 0, 0, 0, 0), [], BAD_VERSION),
    "operation 0": (HEAD.pack(1, 0, 0, 0, 0, 0), [], BAD_OP),
    "operation 9": (HEAD.pack(1, 9, 0, 0, 0, 0), [], BAD_OP),
    "a name that is not there": (HEAD.pack(1, GET, 9, 0, 0, 0), [], BAD_MESSAGE),
    "a payload that is not there": (HEAD.pack(1, PUT, 1, 0, 9, 0) + b"a", [FD], BAD_MESSAGE),
    "more than it says": (HEAD.pack(1, GET, 1, 0, 0, 0) + b"aa", [], BAD_MESSAGE),
    "a payload with get": (HEAD.pack(1, GET, 1, 0, 1, 0) + b"aa", [], BAD_MESSAGE),
    "a name with jump": (HEAD.pack(1, JUMP, 1, 0, 0, 0) + b"a", [], BAD_MESSAGE),
    "an fd with jump": (HEAD.pack(1, JUMP, 0, 0, 0, 0), [FD], BAD_FDS),
    "land without a session": (HEAD.pack(1, LAND, 1, 0, 0, 0) + b"a", [], BAD_NAME),
    "land without a name": (HEAD.pack(1, LAND, 0, 0, 1, 0) + b"a", [], BAD_NAME),
    "a NUL in a session's name": (HEAD.pack(1, LAND, 1, 0, 2, 0) + b"aa\0", [], BAD_NAME),
    "a session's name that is too long": (HEAD.pack(1, LAND, 1, 0, 64, 0) + b"a" + b"s" * 64, [], TOO_LONG),
    "an fd with land": (HEAD.pack(1, LAND, 1, 0, 1, 0) + b"as", [FD], BAD_FDS),
    "a name with stat": (HEAD.pack(1, STAT, 1, 0, 0, 0) + b"a", [], BAD_MESSAGE),
    "flags with put": (HEAD.pack(1, PUT, 1, 1, 0, 0) + b"a", [FD], BAD_MESSAGE),
    "an unknown flag with quit": (HEAD.pack(1, QUIT, 0, 2, 0, 0), [], BAD_MESSAGE),
    "a field that must be zero": (HEAD.pack(1, STAT, 0, 0, 0, 1), [], BAD_MESSAGE),
    "put without a name": (HEAD.pack(1, PUT, 0, 0, 0, 0), [FD], BAD_NAME),
    "a NUL in the name": (HEAD.pack(1, PUT, 2, 0, 0, 0) + b"a\0", [FD], BAD_NAME),
    "put without an fd": (HEAD.pack(1, PUT, 1, 0, 0, 0) + b"a", [], BAD_FDS),
    "put with two fds": (HEAD.pack(1, PUT, 1, 0, 0, 0) + b"a", [FD, FD], BAD_FDS),
    "put with a hundred fds": (HEAD.pack(1, PUT, 1, 0, 0, 0) + b"a", [FD] * 100, BAD_FDS),
    "get with an fd": (HEAD.pack(1, GET, 1, 0, 0, 0) + b"a", [FD], BAD_FDS),
    "a payload that is too long": (HEAD.pack(1, PUT, 1, 0, 4097, 0) + b"a" * 4098, [FD], TOO_LONG),
    "a huge message": (HEAD.pack(1, PUT, 1, 0, 0, 0) + b"a" * 100_000, [FD], TOO_LONG),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_answered_by_name_and_changes_nothing(keeper: keepers.Running, case: str) -> None:
    message, fds, expected = BAD[case]
    with Client(keeper.path) as client:
        client.put(b"a", b"before", b"kept")
        before = (client.status(), keeper.open_files())  # an fd that is refused is closed by the next reply
        assert client.send(message, fds)[1] == expected
        assert (client.status(), keeper.open_files()) == before
        assert client.get(b"a") == (b"before", b"kept")


def test_random_messages_do_no_harm(keeper: keepers.Running) -> None:
    rng = random.Random(20)
    with Client(keeper.path) as client:
        client.put(b"precious", b"contents", b"payload")
        files = keeper.open_files()
        for _ in range(4000):
            name = rng.randbytes(rng.choice([0, 1, 3, 255]))
            payload = rng.randbytes(rng.choice([0, 1, 4096, 5000]))
            head = bytearray(HEAD.pack(1, rng.choice([PUT, GET, DROP, LIST, STAT]), len(name), 0, len(payload), 0))
            for _ in range(rng.choice([0, 0, 1, 2, 8])):
                head[rng.randrange(HEAD.size)] = rng.choice([0, 1, 255, rng.randrange(256)])
            message = bytes(head) + name + payload
            message = message[: rng.choice([len(message), rng.randrange(len(message) + 1)])] or b"\0"
            if message[1:2] == bytes([QUIT]) and message[0] == 1 and len(message) == HEAD.size:
                continue
            _, code, _, fds, _ = client.send(message, [FD] * rng.choice([0, 0, 1, 1, 2, 5]))
            assert code < BUSY or code in {NOT_JUMPED, NOT_LANDED}
            for fd in fds:
                os.close(fd)
        assert client.get(b"precious") == (b"contents", b"payload")
        assert client.status()["held"] > 1
        assert files + client.status()["held"] - 1 == keeper.open_files()


def test_connections_are_bounded_and_the_next_one_is_told(keeper: keepers.Running) -> None:
    held = [Client(keeper.path) for _ in range(64)]
    assert all(client.greeting[1] == OK for client in held)
    with Client(keeper.path) as refused:
        assert refused.greeting[1] == BUSY
    held.pop().socket.close()
    with Client(keeper.path) as served:
        assert served.put(b"a", b"") == OK
    for client in held:
        client.socket.close()


def test_a_client_that_does_not_read_is_cut_off_and_others_are_served(keeper: keepers.Running) -> None:
    with Client(keeper.path) as deaf, Client(keeper.path) as other:
        deaf.socket.settimeout(LONG_S)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while deaf.socket.send(HEAD.pack(1, STAT, 0, 0, 0, 0)):
                sent += 1
                assert sent < 100_000
        assert other.put(b"a", b"x") == OK
        assert other.status()["clients"] == 1


def test_it_ends_when_told_only_if_it_holds_nothing(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        client.put(b"a", b"")
        assert client.ask(QUIT)[1] == HOLDING
        client.ask(DROP, b"a")
        assert client.ask(QUIT)[1] == OK
    assert keeper.ended() == (0, "")
    assert not keeper.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_only_if_it_holds_nothing(program: Path, number: signal.Signals) -> None:
    with keepers.running(program) as keeper:
        with Client(keeper.path) as client:
            client.put(b"a", b"held")
            for ignored in (number, signal.SIGHUP, signal.SIGPIPE):
                keeper.process.send_signal(ignored)
            assert client.get(b"a") == (b"held", b"")
            client.ask(DROP, b"a")
            keeper.process.send_signal(number)
            status, err = keeper.ended()
        assert status == 0
        assert err.splitlines() in (
            [],
            [f"memconsole-keeper: signal {int(number)} is ignored: it holds 1 descriptors, whose memory would be lost"],
        )


def test_a_jump_the_kernel_refuses_is_answered_with_why_and_everything_is_still_held(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        client.put(b"a", b"held", b"payload")
        _, code, payload, _, _ = client.ask(JUMP)
        assert (code, struct.unpack("<I", payload)) == (NOT_JUMPED, (errno.EPERM,))
        assert client.get(b"a") == (b"held", b"payload")


def test_a_session_that_the_kernel_does_not_give_leaves_no_place_taken(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        before = (client.status(), keeper.open_files())
        _, code, payload, _, _ = client.ask(LAND, b"incoming:one", b"memconsole:nobody")
        assert code == NOT_LANDED
        assert struct.unpack("<I", payload)[0] in {errno.ENOENT, errno.EACCES}
        assert (client.status(), keeper.open_files()) == before


def test_a_session_that_is_held_is_not_asked_for_again(keeper: keepers.Running) -> None:
    with Client(keeper.path) as client:
        client.put(b"incoming:one", b"held", b"payload")
        assert client.ask(LAND, b"incoming:one", b"memconsole:one")[1:3] == (OK, bytes(4))
        assert client.get(b"incoming:one") == (b"held", b"payload")


def test_a_second_keeper_on_the_same_socket_is_refused(program: Path, keeper: keepers.Running) -> None:
    second = subprocess.run([program, "-f", keeper.path], capture_output=True, check=False)
    assert second.returncode == 3
    assert b"already serves" in second.stderr
    with Client(keeper.path) as client:
        assert client.put(b"a", b"") == OK


def test_a_socket_left_by_a_dead_keeper_is_taken(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "keeper"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(path))
    stale.close()
    process = subprocess.Popen([program, path], stdin=subprocess.DEVNULL)
    assert process.wait(LONG_S) == 0  # in the background now
    with Client(path) as client:
        pid = client.status()["pid"]
        assert os.getsid(pid) == pid
        assert path.stat().st_mode & 0o777 == 0o600
        assert client.ask(QUIT)[1] == OK


@pytest.mark.parametrize("arguments", [[], ["-f"], ["relative"], ["/" + "x" * 108], ["-f", "/tmp/a", "/tmp/b"]])
def test_bad_arguments_are_a_usage_error(program: Path, arguments: list[str]) -> None:
    ran = subprocess.run([program, *arguments], capture_output=True, check=False, cwd="/")
    assert ran.returncode == 2
    assert ran.stderr


def test_a_full_keeper_says_so_and_goes_on(program: Path) -> None:
    def few_files() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        keepers.drop_capability(24)  # CAP_SYS_RESOURCE: even root may not raise limits

    with keepers.running(program, before=few_files) as keeper, Client(keeper.path) as client:
        status = client.status()
        assert status["room"] == 20
        assert not status["guards"] & 4
        for n in range(20):
            assert client.put(b"%d" % n, b"") == OK
        assert client.put(b"one more", b"") == 8
        assert client.put(b"3", b"replaced") == OK
        assert client.get(b"3") == (b"replaced", b"")
        assert client.ask(DROP, b"4")[1] == OK
        assert client.put(b"one more", b"") == OK


def test_names_and_payloads_are_bounded_in_bytes(program: Path) -> None:
    with keepers.running(program) as keeper, Client(keeper.path) as client:
        fitting = (64 << 20) // (8 + 5 + 4096)
        codes = [client.ask(PUT, b"%05d" % n, b"p" * 4096, [FD])[1] for n in range(fitting + 1)]
        assert codes[:-1] == [OK] * fitting
        assert codes[-1] == 9
        assert client.status()["held"] == fitting
        assert client.ask(PUT, b"00000", b"", [FD])[1] == OK
