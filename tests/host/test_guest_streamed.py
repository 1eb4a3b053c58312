"""The state of a QEMU taken while it runs, its RAM in a memfd or put into one; the next QEMU goes on from it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.firmware import STATUS, counting
from support.waiting import LONG_S, until

from memconsole.backend import steps
from memconsole.backend.guests import statestream
from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.guests.statestream import Before, StateStream
from memconsole.backend.managers import domainxml, saveimage
from memconsole.backend.managers.domainxml import Lock
from memconsole.backend.managers.migration import Elsewhere, filtered
from memconsole.backend.managers.saveimage import Image
from memconsole.errors import BadFile, GuestError, KernelRefused, Refused

RAM = 32 << 20
BINARY = "qemu-system-x86_64"
PIDFD_GETFD = 438
XML = b"<domain type='qemu'><name>web</name><memoryBacking><source type='memfd'/></memoryBacking></domain>"
LOCK = Lock("web", "0123456789abcdef" * 2)
BACKENDS = {
    "memfd": ("memory-backend-memfd", "share=on"),
    "anonymous": ("memory-backend-ram", "share=off"),
}


TAKES = """
import os, sys
from pathlib import Path
import msgspec
from memconsole.backend import steps
from memconsole.backend.guests import statestream
from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.guests.statestream import StateStream
from memconsole.backend.managers.migration import Elsewhere

socket, pid, image, size, statestream._FASTEST = *sys.argv[1:5], int(sys.argv[5])
qmp = Qmp("web", Path(socket))

def monitor(command, arguments, fd=None):
    return qmp.execute(command, arguments, within=300, fd=fd)

taking = StateStream(
    "web", int(pid), monitor, os.open(image, os.O_RDWR), (Elsewhere("pc.ram", int(size)),), guarded=True
)
look, *rest = taking.steps()
look.do()
print(msgspec.json.encode(taking.before).decode(), flush=True)
for _ in steps.run("take", rest):
    pass
"""
"""A process that takes the state of a guest, and says first what its QEMU was before."""


class Qemu:
    """A QEMU of the test's own whose guest checks its memory."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self._qmp = Qmp("web", socket)
        until(self._answers, "its monitor, or its end")

    @property
    def pid(self) -> int:
        return self.process.pid

    def __call__(self, command: str, arguments: Mapping[str, object], fd: int | None = None) -> Any:
        return self._qmp.execute(command, arguments, within=LONG_S, fd=fd)

    def _answers(self) -> bool:
        """Whether its monitor does, which it does when its RAM is there; or it has ended."""
        try:
            self("query-status", {})
        except GuestError:
            return self.process.poll() is not None
        return True

    def close(self) -> None:
        self._qmp.close()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def qemu(directory: Path, backend: str, *words: str, fds: tuple[int, ...] = ()) -> Iterator[Qemu]:
    socket = directory / "qmp"
    socket.unlink(missing_ok=True)
    command = [BINARY, "-accel", "tcg", "-M", "q35,memory-backend=pc.ram", "-m", f"{RAM >> 20}M", "-object"]
    command += [f"{backend},id=pc.ram,size={RAM}", "-display", "none", "-nodefaults"]
    command += ["-qmp", f"unix:{socket},server=on,wait=off", *counting(directory), *words]
    log = directory / "log"
    with log.open("ab") as out:
        made = Qemu(subprocess.Popen(command, pass_fds=fds, stdout=out, stderr=out), socket)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
def _installed() -> None:
    if shutil.which(BINARY) is None or shutil.which("as") is None:
        pytest.skip(f"{BINARY} and binutils are needed")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    yield fd
    os.close(fd)


def their_memfd(pid: int) -> int:
    """The memfd that is a QEMU's RAM, held by us as well (pidfd_getfd)."""
    libc = ctypes.CDLL(None, use_errno=True)
    for path in Path(f"/proc/{pid}/fd").iterdir():
        if str(path.readlink()).startswith("/memfd:memory-backend-memfd"):
            pidfd = os.pidfd_open(pid)
            taken = libc.syscall(PIDFD_GETFD, pidfd, int(path.name), 0)
            os.close(pidfd)
            if taken < 0:
                pytest.skip(f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
            os.set_inheritable(taken, True)
            return int(taken)
    raise AssertionError("it has no memfd")


def told(fd: int) -> tuple[int, int]:
    """Rounds that the guest has ended, and words that were wrong."""
    rounds, wrong = struct.unpack("<II", os.pread(fd, 8, STATUS))
    return rounds, wrong


def goes_on(fd: int, by: int = 3) -> None:
    """The guest ends so many rounds more, and finds nothing wrong."""
    begun, _ = told(fd)
    until(lambda: told(fd)[0] >= begun + by, "rounds of the guest")
    assert told(fd)[1] == 0


def counts(monitor: Qemu) -> bool:
    """Whether a guest has ended a round, by its QEMU's word: nobody else sees its RAM."""
    said = monitor("human-monitor-command", {"command-line": f"xp /1wx {STATUS:#x}"})
    return int(str(said).split()[-1], 16) > 0


def run(stream: StateStream) -> None:
    for _ in steps.run("take", stream.steps()):
        pass


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_a_guest_goes_on_in_the_next_qemu_from_its_ram_and_its_image(tmp_path: Path, image: int, kind: str) -> None:
    """Taken live; locked, so that no QEMU takes it; unlocked for the right digest; nothing in its memory is wrong."""
    backend, share = BACKENDS[kind]
    with contextlib.ExitStack() as stack:
        with qemu(tmp_path, f"{backend},{share}") as first:
            until(lambda: counts(first), "rounds of the guest")
            if kind == "memfd":
                ram, sink = their_memfd(first.pid), -1
                stack.callback(os.close, ram)
            else:
                ram = sink = os.memfd_create("ram")
                stack.callback(os.close, ram)
                os.ftruncate(ram, RAM)
                os.set_inheritable(ram, True)
            saveimage.begin(image, Image(running=True, xml=domainxml.locked(XML, LOCK)))
            taking = StateStream("web", first.pid, first, image, (Elsewhere("pc.ram", RAM, sink),), guarded=True)
            run(taking)
            saveimage.finish(image)
            assert first("query-status", {})["status"] == "postmigrate"
            assert taking.taken is not None
            rounds, wrong = told(ram)
            assert rounds
            assert not wrong
        file = f"memory-backend-file,share=on,mem-path=/proc/self/fd/{ram}"
        saveimage.read(image)
        with qemu(tmp_path, file, "-incoming", f"fd:{image}", fds=(ram, image)) as locked:
            os.set_inheritable(image, True)
            assert locked.process.wait(LONG_S) == 1
        assert "x-ignore-shared is off, but received capability is on" in (tmp_path / "log").read_text()
        with pytest.raises(Refused, match="not unlocked"):
            saveimage.unlock(image, tmp_path / "web.save", (Elsewhere("pc.ram", RAM),), digest="0" * 32)
        saveimage.unlock(image, tmp_path / "web.save", (Elsewhere("pc.ram", RAM),), digest=LOCK.digest)
        state = os.open(tmp_path / "web.save", os.O_RDONLY)
        stack.callback(os.close, state)
        assert saveimage.read(state).running
        with qemu(tmp_path, file, "-incoming", f"fd:{state}", fds=(ram, state)) as second:
            until(lambda: second("query-status", {})["status"] == "running", "the guest goes on")
            goes_on(ram)
            assert told(ram)[0] > rounds


def full_save(monitor: Qemu, path: Path) -> dict[str, int]:
    """What an operator's own save of it writes: records of pages by block."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        monitor("stop", {})
        monitor("getfd", {"fdname": "save"}, fd)
        monitor("migrate", {"uri": "fd:save"})
        until(lambda: monitor("query-migrate", {})["status"] == "completed", "a whole save")
        monitor("cont", {})
        os.lseek(fd, 0, os.SEEK_SET)
        found = filtered(fd, -1, ())
        assert not found.was_locked
        return {block.name: block.kept for block in found.blocks}
    finally:
        os.close(fd)


def settings(monitor: Qemu) -> tuple[Any, Any]:
    return monitor("query-migrate-capabilities", {}), monitor("query-migrate-parameters", {})


def test_one_that_is_taken_back_runs_as_before_and_its_next_save_is_whole(tmp_path: Path, image: int) -> None:
    with qemu(tmp_path, "memory-backend-memfd,share=on") as guest:
        ram = their_memfd(guest.pid)
        goes_on(ram)
        before = settings(guest)
        for _ in range(2):  # and it can be taken again
            taking = StateStream("web", guest.pid, guest, image, (Elsewhere("pc.ram", RAM),), guarded=True)
            run(taking)
            assert os.lseek(image, 0, os.SEEK_END)
            for step in reversed(taking.steps()):
                if step.undo is not None:
                    step.undo()
            assert os.lseek(image, 0, os.SEEK_END) == 0
            assert settings(guest) == before
            goes_on(ram)
        assert full_save(guest, tmp_path / "whole")["pc.ram"] >= RAM // 4096
        goes_on(ram)
        os.close(ram)


def test_whatever_fails_on_the_way_the_guest_runs_as_before(tmp_path: Path, image: int) -> None:
    """Nothing takes the image; a block is of another size; QEMU is killed."""
    with qemu(tmp_path, "memory-backend-memfd,share=on") as guest:
        ram = their_memfd(guest.pid)
        before = settings(guest)
        full = os.open("/dev/full", os.O_WRONLY)
        for target, length, error in ((full, RAM, KernelRefused), (image, RAM << 1, BadFile)):
            with pytest.raises(error):
                run(StateStream("web", guest.pid, guest, target, (Elsewhere("pc.ram", length),), guarded=True))
            assert settings(guest) == before
            goes_on(ram)
        os.close(full)

        taking = StateStream("web", guest.pid, guest, image, (Elsewhere("pc.ram", RAM),), guarded=True)
        look, change, stream = taking.steps()
        look.do()
        change.do()
        guest.process.kill()
        guest.process.wait()
        with pytest.raises(GuestError):
            stream.do()
        with pytest.raises(GuestError):
            statestream.take_back(guest, taking.before)
        os.close(ram)


@pytest.mark.parametrize("point", ["take.set.after", "take.stream.before", "take.stream.after"])
def test_whoever_comes_after_one_that_was_killed_takes_it_back_by_what_was_recorded(
    tmp_path: Path, image: int, point: str
) -> None:
    other = tmp_path / "other"
    with qemu(tmp_path, "memory-backend-memfd,share=on", "-qmp", f"unix:{other},server=on,wait=off") as guest:
        ram = their_memfd(guest.pid)
        before = settings(guest)
        command = [
            sys.executable,
            "-c",
            TAKES,
            str(other),
            str(guest.pid),
            str(tmp_path / "image"),
            str(RAM),
            str(1 << 40),
        ]
        killed = subprocess.run(
            command, check=False, capture_output=True, timeout=LONG_S, env={**os.environ, "MEMCONSOLE_FAULT": point}
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert settings(guest) != before
        statestream.take_back(guest, msgspec.json.decode(killed.stdout, type=Before))
        assert settings(guest) == before
        goes_on(ram)
        os.close(ram)


def test_one_whose_taker_is_killed_in_the_middle_goes_on_by_itself(tmp_path: Path, image: int) -> None:
    """A guest that dirties its RAM faster than it is sent, in the middle of a stream that nobody reads any more."""
    other = tmp_path / "other"
    with qemu(tmp_path, "memory-backend-ram,share=off", "-qmp", f"unix:{other},server=on,wait=off") as guest:
        until(lambda: counts(guest), "rounds of the guest")
        before = settings(guest)
        command = [
            sys.executable,
            "-c",
            TAKES,
            str(other),
            str(guest.pid),
            str(tmp_path / "image"),
            str(RAM),
            str(1 << 20),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as taker:
            assert taker.stdout is not None
            recorded = msgspec.json.decode(taker.stdout.readline(), type=Before)
            until(lambda: guest("query-migrate", {}).get("status") == "active", "the stream is under way")
            taker.kill()
        until(lambda: guest("query-migrate", {})["status"] == "failed", "QEMU sees that nobody reads")
        assert guest("query-status", {})["status"] == "running"
        statestream.take_back(guest, recorded)
        assert settings(guest) == before
        assert full_save(guest, tmp_path / "whole")["pc.ram"] >= RAM // 4096
