"""The canary itself, under ASan and UBSan, with this test as its control process."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import LONG_S

from memconsole import agent as wire
from memconsole.agent import Type

SOURCE = Path(__file__).parents[2] / "memconsole" / "native" / "canary.c"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", "-fsanitize=address,undefined"]
PAGE = 4096
M = 1 << 20
FIRST = 4
POSITION, BEATS, SEAL, BUSY = 32, 40, 64, 72
"""Offsets of ``struct header`` (native/canary_guest.h)."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("canary") / "canary-sanitized"
    subprocess.run([compiler, *FLAGS, "-fno-sanitize-recover=all", "-o", path, SOURCE], check=True)
    return path


class Canary:
    """A canary and the control process's end of its connection."""

    def __init__(self, program: Path, runs_as: str = "", state: int | None = None, **given: int) -> None:
        """One that begins as ``runs_as``, or goes on from a ``state`` with these grants' fds."""
        self.directory = Path(tempfile.mkdtemp(prefix="mc-"))
        path = self.directory / "agents"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.settimeout(LONG_S)
        self.listener.bind(str(path))
        self.listener.listen()
        command = [str(program), "--socket", str(path), "--name", "bird", *(["--as", runs_as] if runs_as else [])]
        command += [] if state is None else ["--restore", str(state)]
        command += [word for grant, fd in given.items() for word in ("--give", f"{grant}={fd}")]
        fds = [*given.values()] if state is None else [state, *given.values()]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=fds)
        self.id = 0
        self.accept()

    def accept(self) -> list[str]:
        """Take its connection and what it says it holds."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(LONG_S)
        hello = wire.unpack(self.connection.recv(wire.MAX_MESSAGE))
        assert hello.type is Type.HELLO
        _, count = wire.HELLO.unpack_from(hello.body)
        names = [wire.unpack_name(raw) for (raw,) in wire.NAME.iter_unpack(hello.body[8:])]
        assert len(names) == count
        return names

    def ask(self, type: Type, body: bytes = b"", fd: int | None = None) -> tuple[int, ...]:
        self.id += 1
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        self.connection.sendmsg([wire.pack(type, self.id, body)], rights)
        answer = wire.unpack(self.connection.recv(wire.MAX_MESSAGE))
        assert answer.id == self.id
        if answer.type is Type.SWEPT:
            return wire.SWEPT.unpack(answer.body)
        if answer.type is Type.REPORTED:
            return wire.REPORTED.unpack(answer.body)[1:7]
        return (wire.DONE.unpack(answer.body)[0],)

    def grant(self, name: str, fd: int, length: int = M, *, offset: int = 0, gpa: int = 0, access: int = 2) -> int:
        body = wire.GRANT.pack(wire.pack_name(name), offset, length, gpa, access, 0)
        return self.ask(Type.GRANT, body, fd)[0]

    def offer_lazily(self, name: str, fd: int, length: int = M) -> int:
        """Grant what it is to hand its page faults over for; the uffd, for whoever means to close it."""
        self.id += 1
        body = wire.GRANT.pack(wire.pack_name(name), 0, length, 0, 2, wire.WANTS_FAULTS)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        self.connection.sendmsg([wire.pack(Type.GRANT, self.id, body)], rights)
        packet, fds, _, _ = socket.recv_fds(self.connection, wire.MAX_MESSAGE, 1)
        message = wire.unpack(packet)
        if message.type is Type.DONE:
            pytest.skip("a canary of this user may have no userfaultfd (vm.unprivileged_userfaultfd)")
        assert (message.type, message.id, len(fds)) == (Type.HANDED, self.id, 1)
        assert wire.HANDED.unpack(message.body)[:2] == (5, 0)
        return fds[0]

    def taken(self, request: int) -> int:
        """Say that the uffd handed over for a request is in custody; what the grant is answered then."""
        self.connection.send(wire.pack(Type.TAKEN, request))
        answer = wire.unpack(self.connection.recv(wire.MAX_MESSAGE))
        assert (answer.type, answer.id) == (Type.DONE, request)
        return int(wire.DONE.unpack(answer.body)[0])

    def unmap(self, name: str) -> int:
        return self.ask(Type.UNMAP, wire.pack_name(name))[0]

    def report(self) -> tuple[int, ...]:
        """State, beats, checked, wrong, gap_ns, gaps."""
        return self.ask(Type.REPORT)

    def sweep(self) -> None:
        """Wait until every page was checked once more."""
        goal = self.report()[2] + M // PAGE
        deadline = time.monotonic() + LONG_S
        while self.report()[2] < goal:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """SIGTERM; its exit status and what the sanitizers said."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, said.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.connection.close()
        self.listener.close()
        shutil.rmtree(self.directory)


@pytest.fixture
def canary(program: Path) -> Iterator[Canary]:
    made = Canary(program, "process")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, M)
    yield fd
    os.close(fd)


def ended_well(canary: Canary) -> None:
    assert canary.end() == (0, "bird: runs as process\n")


def test_it_beats_checks_and_ends_cleanly(canary: Canary, memory: int) -> None:
    assert canary.report()[:2] == (2, 0)
    assert canary.grant("g", memory) == 0
    assert canary.grant("g", memory) == 0
    canary.sweep()
    state, beats, checked, wrong, _, _ = canary.report()
    assert (state, wrong) == (1, 0)
    assert beats > 0
    assert checked >= M // PAGE - FIRST
    ended_well(canary)


def test_stop_ends_it(canary: Canary) -> None:
    assert canary.ask(Type.STOP) == (0,)
    _, said = canary.process.communicate(timeout=LONG_S)
    assert (canary.process.returncode, said) == (0, b"bird: runs as process\n")


def test_it_answers_a_type_it_does_not_know_and_goes_on(canary: Canary, memory: int) -> None:
    assert canary.grant("g", memory) == 0
    canary.connection.send(wire.HEAD.pack(wire.MAGIC, wire.VERSION, 99, 5, wire.HEAD.size + 8) + bytes(8))
    answer = wire.unpack(canary.connection.recv(wire.MAX_MESSAGE))
    assert (answer.type, answer.id, wire.DONE.unpack(answer.body)[0]) == (Type.DONE, 5, errno.EOPNOTSUPP)
    assert canary.report()[0] == 1
    ended_well(canary)


def worked(pid: int) -> float:
    """Seconds of a processor that a process had."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def until_worked(pid: int, more: float) -> None:
    goal, deadline = worked(pid) + more, time.monotonic() + 300
    while worked(pid) < goal:
        assert time.monotonic() < deadline, "it gets no processor"
        time.sleep(0.05)


HUNG_S = 5.0
"""HUNG_NS (native/canary.c)."""


def test_a_vcpu_that_has_no_processor_is_late_and_one_that_has_it_and_never_comes_back_is_hung(
    program: Path, memory: int
) -> None:
    done = subprocess.run([program, "--probe"], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("kvm"):
        pytest.skip(f"KVM does not run this guest here: {done.stdout}")
    canary = Canary(program, "kvm")
    canary.connection.settimeout(300)
    try:
        assert canary.grant("g", memory) == 0
        canary.sweep()
        with mmap.mmap(memory, M) as ram:
            end_of_beat = ram.find(b"\xe6\x77", PAGE, 3 * PAGE) + 2  # out %al, $BEAT_PORT: there the vCPU goes on
            code = ram[end_of_beat : end_of_beat + 2]
            for comes_back in (True, False):
                ram[end_of_beat : end_of_beat + 2] = b"\xeb\xfe"  # to itself
                until_worked(canary.process.pid, 1.0)
                os.kill(canary.process.pid, signal.SIGSTOP)
                time.sleep(HUNG_S + 1)
                os.kill(canary.process.pid, signal.SIGCONT)
                if comes_back:
                    ram[end_of_beat : end_of_beat + 2] = code
                    canary.sweep()
                    assert canary.report()[0] == 1
        assert canary.report()[0] == 3
        assert worked(canary.process.pid) > HUNG_S
    finally:
        canary.close()


@pytest.mark.parametrize(
    "packet", [b"M", b"\xff" * 100, b"\0" * 8192, wire.pack(Type.GRANT, 1, b"x"), wire.pack(Type.HELLO, 1)]
)
def test_it_leaves_a_peer_that_talks_garbage_and_comes_back(canary: Canary, memory: int, packet: bytes) -> None:
    assert canary.grant("g", memory) == 0
    canary.connection.send(packet)
    assert canary.connection.recv(wire.MAX_MESSAGE) == b""
    canary.connection.close()
    assert canary.accept() == ["g"]
    assert canary.report()[0] == 1
    ended_well(canary)


def test_what_it_cannot_map_is_refused(canary: Canary, memory: int) -> None:
    assert canary.grant("g", memory, 4 * PAGE) == errno.EINVAL
    assert canary.grant("g", memory, M - 1) == errno.EINVAL
    assert canary.grant("g", memory, gpa=1) == errno.EINVAL
    assert canary.grant("g", memory, gpa=(1 << 64) - PAGE) == errno.EINVAL
    assert canary.grant("g", memory, gpa=511 << 30) == errno.EINVAL
    assert canary.grant("g", memory, access=4) == errno.EINVAL
    assert canary.grant("g", memory, offset=PAGE) == errno.ERANGE
    assert canary.grant("g", memory, offset=(1 << 64) - PAGE) == errno.ERANGE
    assert canary.ask(Type.GRANT, wire.GRANT.pack(wire.pack_name("g"), 0, M, 0, 2, 0)) == (errno.EBADMSG,)
    assert canary.ask(Type.GRANT, wire.GRANT.pack(b"x" * 64, 0, M, 0, 2, 0), memory) == (errno.EBADMSG,)
    read_only = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    assert canary.grant("g", read_only) == errno.EACCES
    os.close(read_only)
    assert canary.grant("g", memory) == 0
    assert canary.grant("h", memory, gpa=M - PAGE) == errno.EEXIST
    assert canary.unmap("unknown") == 0
    ended_well(canary)


def test_it_touches_nothing_until_its_uffd_is_taken(canary: Canary, memory: int) -> None:
    os.close(canary.offer_lazily("g", memory))
    request = canary.id
    assert canary.report()[:2] == (2, 0)
    assert canary.ask(Type.SWEEP)[0] == 0
    assert os.fstat(memory).st_blocks == 0
    assert canary.taken(request) == 0
    canary.sweep()
    assert canary.taken(request) == errno.ECANCELED
    assert canary.grant("g", memory) == 0
    assert canary.report()[3] == 0
    ended_well(canary)


def test_what_was_not_taken_before_the_connection_ended_comes_again(canary: Canary, memory: int) -> None:
    kept = canary.offer_lazily("g", memory)
    canary.connection.close()
    assert canary.accept() == []
    os.close(canary.offer_lazily("g", memory))
    os.close(kept)
    assert canary.taken(canary.id) == 0
    canary.sweep()
    assert canary.report()[3] == 0
    ended_well(canary)


def test_what_was_not_taken_can_be_taken_back(canary: Canary, memory: int) -> None:
    os.close(canary.offer_lazily("g", memory))
    first = canary.id
    assert canary.unmap("g") == 0
    assert canary.taken(first) == errno.ECANCELED
    os.close(canary.offer_lazily("g", memory))
    second = canary.id
    os.close(canary.offer_lazily("g", memory))
    assert canary.taken(second) == errno.ECANCELED
    assert canary.taken(canary.id) == 0
    canary.sweep()
    assert canary.report()[3] == 0
    ended_well(canary)


def test_it_holds_sixty_four_grants_and_no_more(canary: Canary, memory: int) -> None:
    for number in range(64):
        assert canary.grant(f"g{number}", memory, gpa=number * M) == 0
    assert canary.grant("one more", memory, gpa=64 * M) == errno.ENOSPC
    canary.connection.close()
    assert sorted(canary.accept()) == sorted(f"g{number}" for number in range(64))
    for number in range(64):
        assert canary.unmap(f"g{number}") == 0
    assert canary.grant("one more", memory, gpa=64 * M) == 0
    canary.sweep()
    ended_well(canary)


def test_counters_live_in_the_memory_and_another_canary_goes_on_with_them(program: Path, memory: int) -> None:
    beats = 0
    for _ in range(2):
        canary = Canary(program, "process")
        try:
            assert canary.grant("g", memory) == 0
            assert canary.report()[1] >= beats
            canary.sweep()
            assert canary.unmap("g") == 0
            state, beats, _, wrong, _, _ = canary.report()
            assert (state, wrong) == (2, 0)
            with mmap.mmap(memory, M) as seen:
                assert struct.unpack_from("<Q", seen, BEATS) == (beats,)
            ended_well(canary)
        finally:
            canary.close()


@pytest.fixture
def state() -> Iterator[int]:
    fd = os.memfd_create("state")
    yield fd
    os.close(fd)


def test_its_state_goes_on_in_another_canary(program: Path, canary: Canary, memory: int, state: int) -> None:
    assert canary.ask(Type.SAVE) == (errno.EBADMSG,)
    assert canary.grant("g", memory) == 0
    canary.sweep()
    assert canary.ask(Type.SAVE, b"", state) == (0,)
    assert canary.report()[0] == 2
    beats = canary.report()[1]
    ended_well(canary)
    assert os.fstat(state).st_size == len(os.pread(state, M, 0))
    heir = Canary(program, state=state, g=memory)
    try:
        heir.sweep()
        assert heir.report()[1] > beats
        assert heir.report()[3] == 0
        assert heir.ask(Type.SAVE, b"", state) == (0,)
        ended_well(heir)
    finally:
        heir.close()


def test_a_state_with_anything_in_it_is_refused_or_lived_with(
    program: Path, canary: Canary, memory: int, state: int
) -> None:
    canary.grant("g", memory)
    canary.sweep()
    canary.ask(Type.SAVE, b"", state)
    ended_well(canary)
    good = os.pread(state, M, 0)
    rng = random.Random(9)
    refused = 0
    for _ in range(60):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 3, 30])):
            raw[rng.randrange(16, rng.choice([80, 300, len(raw)]))] = rng.choice([0, 1, 255, rng.randrange(256)])
        raw[12:16] = bytes(4)
        raw[12:16] = zlib.crc32(raw).to_bytes(4, "little")
        os.pwrite(state, raw, 0)
        command = [str(program), "--socket", "/nowhere", "--name", "bird", "--restore", str(state)]
        command += ["--give", f"g={memory}"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=[state, memory])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.15)
        process.terminate()
        said = process.communicate(timeout=LONG_S)[1].decode()
        assert process.returncode in {0, 1, -signal.SIGTERM}, said
        assert "Sanitizer" not in said
        assert "runtime error" not in said
        refused += process.returncode == 1 and said.startswith("bird: it cannot go on: ")
    assert 0 < refused < 60


def _stopped(canary: Canary, memory: int) -> mmap.mmap:
    canary.grant("g", memory)
    canary.sweep()
    canary.unmap("g")
    return mmap.mmap(memory, M)


def test_a_broken_seal_is_wrong_bytes(canary: Canary, memory: int) -> None:
    with _stopped(canary, memory) as seen:
        seen[SEAL] ^= 1
    canary.grant("g", memory)
    canary.sweep()
    assert canary.report()[3] == 8
    ended_well(canary)


def test_a_beat_cut_short_by_a_kill_is_no_wrong_byte(program: Path, canary: Canary, memory: int) -> None:
    """What a killed canary leaves: the next page stamped, the header not yet written, busy set."""
    with _stopped(canary, memory) as seen:
        (position,) = struct.unpack_from("<Q", seen, POSITION)
        span = M // PAGE - FIRST
        page = (FIRST + position % span) * PAGE
        index, generation, _, _ = struct.unpack_from("<4Q", seen, page)
        mask = (1 << 64) - 1
        mix = (index * 0x9E3779B97F4A7C15 & mask) ^ ((generation + 1) * 0xC2B2AE3D27D4EB4F & mask)
        struct.pack_into("<3Q", seen, page, index, generation + 1, mix)
        seen[BUSY] = 1
    ended_well(canary)
    heir = Canary(program, "process")
    try:
        assert heir.grant("g", memory) == 0
        heir.sweep()
        assert heir.report()[3] == 0
        ended_well(heir)
    finally:
        heir.close()


def test_memory_cut_under_it_does_not_kill_it(canary: Canary, memory: int) -> None:
    assert canary.grant("g", memory) == 0
    canary.sweep()
    os.ftruncate(memory, 0)
    try:
        while canary.report()[0] != 3:
            time.sleep(0.01)
    except (OSError, wire.BadMessage):
        canary.connection.close()
        canary.accept()
    assert canary.report()[0] == 3
    assert canary.unmap("g") == 0
    ended_well(canary)


def test_the_probe_and_a_vcpu_under_the_sanitizers(program: Path, memory: int) -> None:
    verdict = subprocess.run([program, "--probe"], capture_output=True, text=True, check=True)
    assert verdict.stderr == ""
    if not verdict.stdout.startswith("kvm "):
        assert verdict.stdout.startswith("none ")
        refused = subprocess.run(
            [program, "--socket", "x", "--name", "bird", "--as", "kvm"], capture_output=True, text=True, check=False
        )
        assert refused.returncode == 1
        assert "KVM" in refused.stderr
        pytest.skip(f"KVM does not run the canary here: {verdict.stdout.strip()}")
    canary = Canary(program, "kvm")
    try:
        assert canary.grant("g", memory) == 0
        canary.sweep()
        assert canary.unmap("g") == 0
        assert canary.grant("g", memory, gpa=M) == 0
        canary.sweep()
        assert canary.report()[3] == 0
        assert canary.end() == (0, "bird: runs as kvm\n")
    finally:
        canary.close()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--name", "x"],
        ["--socket", "x" * 200, "--name", "x"],
        ["--bird"],
        ["--as", "x", "--socket", "x", "--name", "x"],
        ["--socket", "x", "--name", "x", "--restore", "2"],
        ["--socket", "x", "--name", "x", "--restore", "3", "--as", "kvm"],
        ["--socket", "x", "--name", "x", "--give", "g=4"],
        ["--socket", "x", "--name", "x", "--restore", "3", "--give", "g=x"],
        ["--socket", "x", "--name", "x", "--restore", "3", "--give", "=4"],
        ["--socket", "x", "--name", "x", "--restore", "3", "--paused", "no"],
    ],
)
def test_a_wrong_command_line_is_status_two(program: Path, arguments: list[str]) -> None:
    told = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert told.stderr.startswith("usage: ")
