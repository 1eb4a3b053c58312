"""One connection, one owner at a time: monitors, keepers and servers that answer several threads, or nobody."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.exports.fuse import FuseTree
from memconsole.backend.guests.qmp import Qmp
from memconsole.backend.peers.turns import BUSY, Turn
from memconsole.errors import GuestError, MemconsoleError, Silent

LONG_S = 6.0


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mc-") as made:
        yield Path(made)


def in_thread(work: threading.Thread) -> threading.Thread:
    work.daemon = True
    work.start()
    return work


# --- the turn ---------------------------------------------------------------------------------------------------


def test_a_caller_whose_turn_does_not_come_is_told_who_has_it() -> None:
    turn, has, over = Turn("the monitor"), threading.Event(), threading.Event()

    def keep() -> None:
        with turn.taken("migrate", LONG_S):
            has.set()
            assert over.wait(LONG_S)

    keeper = in_thread(threading.Thread(target=keep, name="the-other"))
    assert has.wait(LONG_S)
    words = r"the monitor was not asked for query-status.*the-other.*migrate"
    with pytest.raises(Silent, match=words) as busy, turn.taken("query-status", 0.05):
        pass
    assert busy.value.code == BUSY
    over.set()
    with turn.taken("query-status", LONG_S) as left, turn.taken("again", left):
        pass
    keeper.join()


# --- a monitor ----------------------------------------------------------------------------------------------------


class Monitor:
    """A QMP server that serves one connection at a time, as QEMU does; while ``mute`` it greets and answers nobody."""

    def __init__(self, path: Path) -> None:
        self.mute = threading.Event()
        self.connections = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        in_thread(threading.Thread(target=self._serve))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                with connection, contextlib.suppress(OSError):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        version = {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}
        if not self.mute.is_set():
            connection.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\n")
        text = ""
        while data := connection.recv(4096):
            text += data.decode()
            while text.strip():
                try:
                    asked, end = json.JSONDecoder().raw_decode(text.lstrip())
                except ValueError:
                    break
                text = text.lstrip()[end:]
                if not self.mute.is_set():
                    said = {"return": {"asked": asked["execute"]}, "id": asked.get("id")}
                    connection.sendall(json.dumps(said).encode() + b"\n")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def monitor(directory: Path) -> Iterator[Monitor]:
    with contextlib.closing(Monitor(directory / "qmp")) as made:
        yield made


def test_threads_that_ask_one_monitor_at_once_all_get_their_answers(monitor: Monitor, directory: Path) -> None:
    said: list[object] = []
    with contextlib.closing(Qmp("vm", directory / "qmp")) as qmp:
        ready = threading.Barrier(4)

        def ask(number: int) -> None:
            ready.wait(LONG_S)
            said.append(qmp.execute(f"query-{number}", within=LONG_S))

        threads = [in_thread(threading.Thread(target=ask, args=(number,))) for number in range(4)]
        for thread in threads:
            thread.join()
    assert sorted(map(str, said)) == [str({"asked": f"query-{number}"}) for number in range(4)]
    assert monitor.connections == 1


def test_a_monitor_that_says_nothing_is_no_answer_and_names_who_waits(monitor: Monitor, directory: Path) -> None:
    with contextlib.closing(Qmp("vm", directory / "qmp")) as qmp:
        monitor.mute.set()
        waits = in_thread(threading.Thread(target=lambda: refused(qmp, "query-first", 0.5), name="first"))
        while qmp._turn._holder is None:
            pass
        with pytest.raises(GuestError, match=r"thread first has had the connection.*query-first") as busy:
            qmp.execute("query-second", within=0.05)
        assert busy.value.code == BUSY
        waits.join()
        monitor.mute.clear()
        assert qmp.execute("query-third", within=LONG_S) == {"asked": "query-third"}


def refused(qmp: Qmp, command: str, within: float) -> str:
    try:
        return str(qmp.execute(command, within=within))
    except GuestError as error:
        return str(error)


def test_who_waits_for_a_monitor_stops_when_it_is_let_go(monitor: Monitor, directory: Path) -> None:
    qmp, said = Qmp("vm", directory / "qmp"), []
    monitor.mute.set()
    waits = in_thread(threading.Thread(target=lambda: said.append(refused(qmp, "query-status", LONG_S))))
    while qmp._under_way is None:
        pass
    qmp.close()
    waits.join()
    assert said == ["guest vm is not asked any more: query-status was under way (try again)"]
    assert "not asked any more" in refused(qmp, "query-status", LONG_S)


# --- keeper and mount ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "code"), [(KeeperCustody, "CustodySilent"), (FuseTree, "FuseSilent")])
@pytest.mark.parametrize("full", [False, True], ids=["lets nobody in", "has no room for who waits"])
def test_a_daemon_that_greets_nobody_is_silent_and_not_gone(
    directory: Path, kind: type[KeeperCustody | FuseTree], code: str, *, full: bool
) -> None:
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        if full:
            for _ in range(2):
                other = waiting.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                other.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    other.connect(str(path))
        with pytest.raises(Silent) as silent:
            kind(path, timeout=0.05)
    assert silent.value.code == code
    assert f"pid {0 if full else os.getpid()}" in silent.value.what
    assert "kill -CONT" in silent.value.remedy
    with pytest.raises(MemconsoleError) as gone:
        kind(path, timeout=0.05)
    assert gone.value.code != code
