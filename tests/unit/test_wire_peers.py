"""Peers: who the kernel says they are, what they may take, and what is said of them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.open_fds import opened

from memconsole.backend.exports import fd
from memconsole.backend.peers import peer as peers
from memconsole.backend.peers.peer import ConnectionLimits, ConnectionSlots, Peer, PeerLog, Rate

STRANGER, VIEWER, OPERATOR = range(3)


def connected(path: Path) -> tuple[socket.socket, int]:
    """The service's end of a connection that another process made and then ended, and the pid that it had."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # A third process keeps the connection, as whoever is sent a descriptor does.
        code = (
            "import os, socket, sys\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "if os.fork(): sys.exit()\n"
            "os.setsid(); s.recv(1)\n"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(path)])
        sock, _ = listener.accept()
        child.wait()
    return sock, child.pid


def test_a_process_that_connected_and_ended_is_told_from_one_that_has_its_number(tmp_path: Path) -> None:
    sock, pid = connected(tmp_path / "socket")
    with sock:
        peer = Peer.of(sock)
        try:
            assert peer.pid == pid
            if peer.process is None and not peer.ended:
                pytest.skip("this kernel has no SO_PEERPIDFD")
            assert not peer.is_alive()
            assert peer.who() == f"uid {os.getuid()} pid {pid} (ended)"
        finally:
            peer.close()


def test_a_process_that_runs_is_who_it_is() -> None:
    one, other = socket.socketpair()
    with one, other:
        peer = Peer.of(one)
        assert peer.is_alive()
        assert peer.who() == str(peer) == f"uid {os.getuid()} pid {os.getpid()}"
        if peer.process is not None:
            assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{peer.process}").read_text()
            assert not os.get_inheritable(peer.process)
        held = peer.process
        before = opened()
        peer.close()
        assert held is None or (before - opened()).total() == 1


def test_a_kernel_without_them_goes_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_SO_PEERPIDFD", 9999)
    one, other = socket.socketpair()
    with one, other:
        peer = Peer.of(one)
        assert (peer.process, peer.ended, peer.is_alive()) == (None, False, True)


AGENT = """
import os, socket, sys
from memconsole import agent
print(os.getpid(), flush=True)
sys.stdin.readline()
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
if sys.argv[2] == "ended" and os.fork():
    os._exit(0)
s.send(agent.pack(agent.Type.HELLO, 0, agent.HELLO.pack(0, 0)))
s.recv(1)
"""


@pytest.mark.parametrize("how", ["ended", "running"])
def test_a_guest_is_its_process_and_not_whoever_has_its_number(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process connects as an agent and ends: the connection is nobody's, although the number is a guest's again."""
    if not peers_have_processes():
        pytest.skip("this kernel has no SO_PEERPIDFD")
    path = tmp_path / "agents"
    monkeypatch.setattr(fd, "stat", lambda _pid: ("R", 77))
    words = [sys.executable, "-c", AGENT, str(path), how]
    with contextlib.closing(fd.Hub(path)) as hub:
        accept = hub._accept
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdin is not None

            def accept_late() -> None:
                if how == "ended":
                    child.wait(30)
                accept()

            monkeypatch.setattr(hub, "_accept", accept_late)
            hub.register("guest", int(child.stdout.readline()), 77)
            child.stdin.close()
            assert hub.connected("guest", within=1 if how == "ended" else 30) is (how == "running")
            hub.unregister("guest")


def peers_have_processes() -> bool:
    one, other = socket.socketpair()
    with one, other, contextlib.closing(Peer.of(one)) as peer:
        return peer.process is not None


def ranked(peer: Peer) -> int:
    return peer.gid


def test_lower_ranks_leave_room_for_higher_ones() -> None:
    places = ConnectionSlots(ConnectionLimits((4, 6, 8), per_user=100, per_stranger=100), ranked)

    def take(rank: int) -> bool:
        peer = Peer(1, 5, rank)
        if places.take(peer)[1]:
            places.give_up(peer, rank)
            return False
        return True

    assert [take(STRANGER) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [take(VIEWER) for _ in range(4)] == [True] * 2 + [False] * 2
    assert [take(OPERATOR) for _ in range(4)] == [True] * 2 + [False] * 2
    places.give_up(Peer(1, 5, OPERATOR), OPERATOR)
    assert take(OPERATOR)


def test_one_user_has_a_share_and_a_stranger_a_smaller_one() -> None:
    places = ConnectionSlots(ConnectionLimits((40, 60, 80), per_user=3, per_stranger=2), ranked)
    assert [bool(places.take(Peer(1, 5, STRANGER))[1]) for _ in range(3)] == [False, False, True]
    assert [bool(places.take(Peer(1, 6, OPERATOR))[1]) for _ in range(4)] == [False, False, False, True]
    assert not any(places.take(Peer(1, 0, OPERATOR))[1] for _ in range(20))


def test_a_rate_is_kept_by_each_and_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = Rate(each=2, together=5)
    assert [rate.take(1) for _ in range(4)] == [True, True, False, False]
    assert sum(rate.take(uid) for uid in range(2, 60_000)) == 3
    assert rate.left_out == 2 + 59_998 - 3
    assert len(rate._taken) < 10  # what is kept does not grow with those who are left out
    now[0] += 60
    assert rate.take(1)


def test_what_is_left_out_of_the_log_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    due: list[Callable[[], None]] = []
    told = PeerLog(lambda _, what: due.append(what))
    with caplog.at_level(logging.INFO, "memconsole.wire"):
        for _ in range(5000):
            told.line(logging.WARNING, Peer(7, 1000, 7), "refused %s", "x")
        told.line(logging.WARNING, Peer(8, 1001, 7), "another")
        assert [each.message for each in caplog.records] == ["refused x"] * 10 + ["another"]
        assert len(due) == 1
        due.pop()()
    assert caplog.records[-1].message.startswith("4990 more lines about peers were left out within a minute")
    for _ in range(20):
        told.line(logging.WARNING, Peer(7, 1000, 7), "refused %s", "x")
    assert len(due) == 1
