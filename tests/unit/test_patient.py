"""Processes are read by threads that may be left behind: one that is locked up holds up nobody but those."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.waiting import LONG_S, until

from memconsole.backend.kernel import census, patient, tree
from memconsole.errors import Gone, NotFound, Silent


class Locked:
    """Processes whose readers are blocked until they are let go, as the kernel would have it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *pids: int) -> None:
        self.pids = pids
        self.free = threading.Event()
        self.readers: dict[int, int] = {}
        self.asked: list[int] = []
        stands = patient._Reader.stands

        def blocked(reader: patient._Reader) -> tuple[str, str]:
            held = reader.tid in self.readers.values() and not self.free.is_set()
            return ("D", "1 2 3") if held else stands(reader)

        monkeypatch.setattr(patient._Reader, "stands", blocked)

    def read(self, pid: int) -> str:
        self.asked.append(pid)
        if pid in self.pids and not self.free.is_set():
            self.readers[pid] = threading.get_native_id()
            assert self.free.wait(LONG_S)
        if pid == 5:
            raise Gone("it is gone", "")
        return f"process {pid}"


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patient, "WITHIN_S", 0.2)
    monkeypatch.setattr(patient, "LOOK_S", 0.02)
    yield
    until(lambda: not patient._blocked, "no reader is blocked any more")


def test_all_are_read_by_one_thread_that_is_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Locked(monkeypatch)
    threads: set[int] = set()

    def read(pid: int) -> str:
        threads.add(threading.get_native_id())
        return locked.read(pid)

    assert patient.each([1, 2, 3], read) == {1: "process 1", 2: "process 2", 3: "process 3"}
    assert patient.call(4, read) == "process 4"
    assert len(threads) == 1
    assert threading.get_native_id() not in threads


def test_an_error_of_one_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Locked(monkeypatch)
    answers = patient.each([4, 5, 6], locked.read)
    assert isinstance(answers[5], Gone)
    assert (answers[4], answers[6]) == ("process 4", "process 6")
    with pytest.raises(Gone):
        patient.call(5, locked.read)
    with pytest.raises(ZeroDivisionError):
        patient.each([1], lambda pid: pid // 0)


def test_the_others_are_read_beside_those_that_are_locked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Locked(monkeypatch, 2, 4)
    try:
        answers = patient.each([1, 2, 3, 4, 6], locked.read)
        assert {pid for pid, answer in answers.items() if isinstance(answer, Silent)} == {2, 4}
        assert [answers[pid] for pid in (1, 3, 6)] == ["process 1", "process 3", "process 6"]
        assert "lock of its memory map" in str(answers[2])
        locked.asked.clear()
        threads = threading.active_count()
        for _ in range(5):
            assert isinstance(patient.each([2, 3], locked.read)[2], Silent)
        assert locked.asked == [3] * 5
        assert threading.active_count() <= threads
    finally:
        locked.free.set()
    until(lambda: not patient._blocked, "their readers came back")
    assert patient.each([2, 4], locked.read) == {2: "process 2", 4: "process 4"}


def test_one_that_comes_back_in_time_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient, "WITHIN_S", LONG_S)
    locked = Locked(monkeypatch, 2)
    threading.Timer(0.3, locked.free.set).start()
    assert patient.each([1, 2, 3], locked.read) == {1: "process 1", 2: "process 2", 3: "process 3"}


def test_a_reader_that_waits_for_a_processor_is_not_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that sleeps in this interpreter: only the kernel's state D counts."""

    def read(pid: int) -> int:
        time.sleep(1.0)
        return pid

    assert patient.each([1], read) == {1: 1}


def test_files_that_take_the_lock_are_read_by_a_reader_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    call = patient.call

    def noted(pid: int, read: Callable[[int], bytes]) -> bytes:
        asked.append(pid)
        return call(pid, read)

    monkeypatch.setattr(patient, "call", noted)
    own = os.getpid()
    for name in ("cmdline", "environ", "maps", "smaps", f"task/{own}/smaps"):
        assert tree.read("/", f"/proc/{own}/{name}")
    assert asked == [own] * 5
    tree.read("/", f"/proc/{own}/status")
    with pytest.raises(NotFound):
        tree.read("/", "/proc/none")
    assert asked == [own] * 5


def test_a_process_that_is_locked_up_is_there_without_its_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = census._shown

    def read(*arguments: object) -> object:
        if arguments[1] == os.getpid():
            raise Silent(f"process {os.getpid()} does not show its memory", "it is locked", "look why")
        return shown(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(census, "_shown", read)
    seen = census.take()
    own = seen.processes[os.getpid()]
    assert own.comm
    assert own.fds
    assert own.maps == b""
    assert os.getpid() in seen.hidden
    (gap,) = [gap for gap in seen.gaps() if "memory" in gap.source]
    assert (gap.why, gap.remedy) == ("it is locked", "look why")
    assert seen.unseen
