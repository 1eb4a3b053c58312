"""Processes stopped while contents move: they go on afterwards, whatever becomes of who stopped them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.children import killable
from support.desks import Desk, desks
from support.waiting import LONG_S, until

from memconsole.backend.peers.handle import Handle
from memconsole.backend.revoke import stop_processes
from memconsole.backend.revoke.stop_processes import processes_stopped
from memconsole.errors import GuestError

GONE = 2**22 + 1


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desks(tmp_path) as made:
        yield made


@pytest.fixture
def child() -> Iterator[int]:
    with killable() as pid:
        yield pid


def stopped(pid: int) -> bool:
    with Handle(pid) as handle:
        return handle.stopped()


def once(*pids: int) -> Callable[[], tuple[int, ...]]:
    """What names these processes at the first look, and nobody afterwards."""
    left = [pids]
    return lambda: left.pop() if left else ()


def test_a_process_stands_still_inside_and_goes_on_afterwards(desk: Desk, child: int) -> None:
    with processes_stopped(desk, once(child), LONG_S) as note:
        assert stopped(child)
        assert desk.custody.names() == [f"halted:{child}"], "whoever comes after a death lets it go on"
    until(lambda: not stopped(child), "it goes on")
    assert (note(), desk.custody.names()) == ("", [])


def test_it_goes_on_when_what_was_to_be_done_fails(desk: Desk, child: int) -> None:
    with pytest.raises(GuestError), processes_stopped(desk, once(child), LONG_S):
        raise GuestError("the contents cannot be copied")
    until(lambda: not stopped(child), "it goes on")
    assert desk.custody.names() == []


def test_one_that_was_stopped_before_stays_stopped(desk: Desk, child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    until(lambda: stopped(child), "it stands still")
    with processes_stopped(desk, once(child), LONG_S):
        assert desk.custody.names() == []
    assert stopped(child)


def test_one_that_is_gone_is_passed_over(desk: Desk) -> None:
    with processes_stopped(desk, once(GONE), LONG_S) as note:
        pass
    assert note() == ""


def test_nobody_is_stopped_once_the_time_is_over(desk: Desk, child: int) -> None:
    with processes_stopped(desk, once(child), 0):
        assert not stopped(child)


def test_one_that_does_not_stop_is_named(desk: Desk, child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_processes, "_MANNERS_S", 0.0)
    monkeypatch.setattr(Handle, "stopped", lambda _: False)
    with processes_stopped(desk, once(child), LONG_S) as note:
        pass
    assert note() == f"not stopped meanwhile: {child}"


def test_those_whom_a_control_process_stopped_before_it_died_go_on(desk: Desk, child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    with Handle(child) as handle:
        desk.custody.put(f"halted:{child}", handle.fileno())
        desk.custody.put("region:web:0", handle.fileno())
    stop_processes.continue_stopped(desk)
    until(lambda: not stopped(child), "it goes on")
    assert desk.custody.names() == ["region:web:0"]


def test_one_that_ended_meanwhile_is_only_forgotten(desk: Desk, child: int) -> None:
    with Handle(child) as handle:
        desk.custody.put(f"halted:{child}", handle.fileno())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    stop_processes.continue_stopped(desk)
    assert desk.custody.names() == []
