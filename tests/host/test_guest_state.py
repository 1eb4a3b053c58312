"""A guest's state, saved and started from again on this host: it counts on from where it stood, in the same memory."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from support.guests import given, hubs, own_frames, region, sweep
from support.waiting import LONG_S, accepts, until

from memconsole.backend.exports.fd import Hub
from memconsole.backend.guests import commandline
from memconsole.backend.guests.base import Restart
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.guests.qemu import QemuGuest
from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.peers.handle import Handle
from memconsole.errors import GuestError
from memconsole.model import GuestState
from memconsole.native import program

M = 1 << 20
RAM = 32 * M
COUNTER = 0x8000
"""GPA of the counter of the boot sector below."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hubs() as make:
        yield make()


@pytest.fixture
def state() -> Iterator[int]:
    fd = os.memfd_create("state", os.MFD_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture(params=["kvm", "process"])
def runs_as(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm":
        probe = subprocess.run([program("memconsole-canary"), "--probe"], capture_output=True, text=True, check=True)
        if not probe.stdout.startswith("kvm "):
            pytest.skip(f"KVM does not run the canary here: {probe.stdout.strip()}")
    return str(request.param)


@contextlib.contextmanager
def started(again: Restart, fds: dict[str, int], log: Path) -> Iterator[Handle]:
    """The process of a restart, with these fds of custody; killed at the end."""
    actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT, 0o600)]
    high = [os.dup(fds[name]) for name, _ in again.fds]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for fd, (_, number) in zip(high, again.fds, strict=True)]
    assert min(high) > max(number for _, number in again.fds)
    pid = os.posix_spawnp(again.words[0], list(again.words), os.environ, file_actions=actions)
    for fd in high:
        os.close(fd)
    with Handle(pid, child=True) as handle:
        try:
            yield handle
        finally:
            handle.kill()


def beats(guest: CanaryGuest) -> int:
    progress = guest.progress()
    assert progress is not None
    assert progress.wrong == 0
    return progress.beats


def checked(guest: CanaryGuest) -> int:
    progress = guest.progress()
    assert progress is not None
    return progress.checked


def goes_on(guest: CanaryGuest, stood: int, pages: int) -> None:
    """It makes beats again, and checks so many pages by itself."""
    until(lambda: beats(guest) > stood, "beats")
    seen = checked(guest)
    until(lambda: checked(guest) > seen + pages, "a sweep by itself")


def counts_on(fd: int, stood: int) -> None:
    until(lambda: count(fd) > stood, "its counting on")
    assert count(fd) - stood < 1 << 31


def test_a_canary_goes_on_in_another_process(hub: Hub, state: int, runs_as: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        fd, more = stack.enter_context(region(M)), stack.enter_context(region(M))
        home = stack.enter_context(given(fd, "g-1", M))
        second = stack.enter_context(given(more, "g-2", M, gpa=16 * M))
        guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", runs_as])
        first = stack.enter_context(Handle(guest.pid, child=True))
        stack.callback(first.kill)
        assert guest.offer(home, 10)
        assert guest.offer(second, 10)
        until(lambda: checked(guest) > 4 * 512, "two sweeps")
        assert sweep(guest, 10) == (2 * (M // 4096 - 4), 0)
        assert guest.blackout() == (0, 0)
        for turn in (1, 2):
            guest.save(state, 10)
            assert guest.state() is GuestState.PAUSED
            stood, before = beats(guest), own_frames(fd, M)
            grants = [("g-2", "region:b"), ("g-1", "region:a")]
            again = guest.restart(hub.path, "state", grants, paused=turn == 2)
            guest.kill()
            guest.close()
            fds = {"state": state, "region:a": fd, "region:b": more}
            process = stack.enter_context(started(again, fds, tmp_path / "log"))
            guest = CanaryGuest.adopt("bird", process.pid, process.start_ticks, hub, [home, second])
            stack.callback(guest.close)
            assert hub.connected("bird", 30)
            assert hub.mapped("bird") == {"g-1", "g-2"}
            if turn == 2:
                assert guest.state() is GuestState.PAUSED
                assert beats(guest) == stood
                guest.resume()
            goes_on(guest, stood, 512)
            assert sweep(guest, 10) == (2 * (M // 4096 - 4), 0)
            restored, blackout = guest.blackout()
            assert restored == turn
            assert 0 < blackout < 60_000_000_000
            progress = guest.progress()
            assert progress is not None
            assert progress.runs_as == runs_as
            assert own_frames(fd, M) == before


def test_a_saved_canary_can_be_let_go_on_where_it_is(hub: Hub, state: int, runs_as: str, tmp_path: Path) -> None:
    guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", runs_as])
    try:
        with region(M) as fd, given(fd, "g-1", M) as offer:
            guest.offer(offer, 10)
            until(lambda: checked(guest) > 512, "a sweep")
            guest.save(state, 10)
            stood = beats(guest)
            guest.resume()
            until(lambda: beats(guest) > stood + 10, "beats")
            assert sweep(guest, 10) == (M // 4096 - 4, 0)
            assert guest.blackout() == (0, 0)
    finally:
        guest.kill()
        guest.close()


def test_a_restored_canary_waits_for_what_it_was_not_given(hub: Hub, state: int, runs_as: str, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        fd, more = stack.enter_context(region(M)), stack.enter_context(region(M))
        home = stack.enter_context(given(fd, "g-1", M))
        second = stack.enter_context(given(more, "g-2", M, gpa=16 * M))
        guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", runs_as])
        stack.callback(guest.close)
        assert guest.offer(home, 10)
        assert guest.offer(second, 10)
        until(lambda: checked(guest) > 4 * 512, "two sweeps")
        guest.save(state, 10)
        stood = beats(guest)
        again = guest.restart(hub.path, "state", [("g-2", "region:b")])
        guest.kill()
        process = stack.enter_context(started(again, {"state": state, "region:b": more}, tmp_path / "log"))
        guest = CanaryGuest.adopt("bird", process.pid, process.start_ticks, hub, [second])
        stack.callback(guest.close)
        assert hub.connected("bird", 30)
        assert guest.state() is GuestState.PAUSED
        assert guest.offer(home, 10)
        until(lambda: beats(guest) > stood + 10, "beats")
        assert sweep(guest, 10) == (2 * (M // 4096 - 4), 0)


def test_a_restored_canary_notices_that_its_memory_is_not_what_it_was(
    hub: Hub, state: int, runs_as: str, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        fd, other = stack.enter_context(region(M)), stack.enter_context(region(M))
        home = stack.enter_context(given(fd, "g-1", M))
        guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", runs_as])
        stack.callback(guest.close)
        assert guest.offer(home, 10)
        until(lambda: checked(guest) > 2 * 512, "two sweeps")
        guest.save(state, 10)
        again = guest.restart(hub.path, "state", [("g-1", "region:a")])
        guest.kill()
        os.pwrite(fd, b"\xff" * 9, 100 * 4096 + 3)  # in its stamp
        for memory, expected in ((fd, range(8, 10)), (other, range(4096, 8 * M))):
            with started(again, {"state": state, "region:a": memory}, tmp_path / "log") as process:
                heir = CanaryGuest.adopt("bird", process.pid, process.start_ticks, hub, [home])
                assert hub.connected("bird", 30)
                swept = sweep(heir, 10)[1]
                progress = heir.progress()  # after the sweep: what that did not find any more, a beat had found
                assert progress is not None
                assert swept in expected or progress.wrong in expected
                heir.close()


SPOILED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no state": (lambda raw: b"\0" * len(raw), "it is no canary's state"),
    "another version": (lambda raw: raw[:8] + b"\2" + raw[9:], "of a version this canary does not know"),
    "truncated": (lambda raw: raw[:-1], "truncated"),
    "a bit": (lambda raw: raw[:300] + bytes([raw[300] ^ 1]) + raw[301:], "its checksum does not match"),
    "nothing": (lambda _: b"", "it is no canary's state"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_state_is_refused_by_name(hub: Hub, state: int, tmp_path: Path, how: str) -> None:
    spoil, why = SPOILED[how]
    guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", "process"])
    try:
        guest.save(state, 10)
        again = guest.restart(hub.path, "state", [])
    finally:
        guest.kill()
        guest.close()
    raw = spoil(os.pread(state, M, 0))
    os.ftruncate(state, 0)
    os.pwrite(state, raw, 0)
    log = tmp_path / "again"
    with started(again, {"state": state}, log) as process:
        assert process.wait(LONG_S)
    assert log.read_text().startswith("bird: it cannot go on: its state: ")
    assert why in log.read_text()


def test_a_canary_beyond_going_on_is_not_saved(hub: Hub, state: int, runs_as: str, tmp_path: Path) -> None:
    guest = CanaryGuest.start("bird", hub, tmp_path, args=["--as", runs_as])
    try:
        with region(M) as fd, given(fd, "g-1", M) as offer:
            guest.offer(offer, 10)
            until(lambda: checked(guest) > 0, "a sweep")
            guest.pause()
            os.pwrite(fd, (1 << 20).to_bytes(8, "little"), 8)  # struct header: pages
            guest.resume()
            until(lambda: guest.state() is GuestState.STOPPED, "its end")
            with pytest.raises(GuestError, match="SAVE"):
                guest.save(state, 10)
    finally:
        guest.kill()
        guest.close()


# --- QEMU --------------------------------------------------------------------------------------------------------

BOOT_SECTOR = (
    bytes.fromhex("fa 31c0 8ed8")  # cli; xor ax, ax; mov ds, ax
    + bytes.fromhex("66 ff06 0080")  # inc dword [0x8000]
    + bytes.fromhex("eb f9")  # jmp to inc
).ljust(510, b"\0") + b"\x55\xaa"


def count(fd: int) -> int:
    """The guest's counter, as its region has it."""
    return int(struct.unpack("<I", os.pread(fd, 4, COUNTER))[0])


@pytest.fixture
def disk(tmp_path: Path) -> Sequence[str]:
    if shutil.which(commandline.BINARY) is None:
        pytest.skip(f"{commandline.BINARY} is not installed")
    image = tmp_path / "disk"
    image.write_bytes(BOOT_SECTOR.ljust(M, b"\0"))
    return ["-drive", f"file={image},format=raw,if=ide,readonly=off", "-boot", "c"]


def answered(ask: Callable[[], object], awaited: str) -> bool:
    return awaited in json.dumps({"return": ask()})


def converse(again: Restart, directory: Path) -> None:
    """What memconsole-resume says to a monitor, through the monitor's own client."""
    monitor = Qmp("vm", directory / "qmp")
    try:
        for line, awaited in again.lines[1:]:  # the client negotiates capabilities itself
            message = json.loads(line)

            ask = partial(monitor.execute, message["execute"], message.get("arguments"), within=30)
            until(partial(answered, ask, awaited), line)
    finally:
        monitor.close()


def test_qemu_counts_on_from_the_same_value(state: int, disk: Sequence[str], tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        fd = stack.enter_context(region(RAM))
        ram = stack.enter_context(given(fd, "g-1", RAM))
        guest = QemuGuest.start("vm", ram, tmp_path, args=disk)
        stack.callback(guest.close)
        process = stack.enter_context(Handle(guest.pid, guest.start_ticks, child=True))
        stack.callback(process.kill)
        until(lambda: count(fd) > 1000, "the guest's counting")
        for turn in range(2):
            guest.save(state, 60)
            stood, frames = count(fd), own_frames(fd, RAM)
            assert os.fstat(state).st_size < 4 * M  # devices and vCPUs, no RAM
            again = guest.restart("state", "region:vm", paused=turn == 1)
            assert again.words.count("-incoming") == 1
            guest.close()
            process.kill()
            (tmp_path / "qmp").unlink()
            assert count(fd) == stood
            process = stack.enter_context(started(again, {"state": state, "region:vm": fd}, tmp_path / "log"))
            until(lambda: accepts(tmp_path / "qmp"), "a monitor")
            converse(again, tmp_path)
            guest = QemuGuest.adopt("vm", process.pid, process.start_ticks, tmp_path, "g-1")
            stack.callback(guest.close)
            if turn == 1:
                assert guest.state() is GuestState.PAUSED
                assert count(fd) == stood
                guest.resume()
            counts_on(fd, stood)
            assert own_frames(fd, RAM) == frames
            os.ftruncate(state, 0)


def test_a_saved_qemu_can_be_let_go_on_where_it_is(state: int, disk: Sequence[str], tmp_path: Path) -> None:
    with region(RAM) as fd, given(fd, "g-1", RAM) as ram:
        guest = QemuGuest.start("vm", ram, tmp_path, args=disk)
        try:
            until(lambda: count(fd) > 1000, "the guest's counting")
            guest.save(state, 60)
            assert guest.state() is GuestState.PAUSED
            stood = count(fd)
            guest.resume()
            assert guest.state() is GuestState.RUNNING
            until(lambda: count(fd) > stood, "its counting on")
        finally:
            guest.stop(10)
            guest.close()


def test_a_qemu_that_cannot_be_migrated_says_so_and_runs_on(state: int, disk: Sequence[str], tmp_path: Path) -> None:
    unfit = ["-device", "ivshmem-plain,memdev=m,master=off", "-object", "memory-backend-ram,id=m,size=1M,share=on"]
    with region(RAM) as fd, given(fd, "g-1", RAM) as ram:
        guest = QemuGuest.start("vm", ram, tmp_path, args=[*disk, *unfit])
        try:
            until(lambda: count(fd) > 1000, "the guest's counting")
            with pytest.raises(GuestError, match="ivshmem"):
                guest.save(state, 60)
            guest.resume()
            stood = count(fd)
            until(lambda: count(fd) > stood, "its counting on")
        finally:
            guest.stop(10)
            guest.close()
