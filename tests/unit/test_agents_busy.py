"""The agents socket and guests that are busy: what one is at is named, and no other waits for it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.guests import greet, knock
from support.waiting import until

from memconsole import agent as wire
from memconsole.agent import Type
from memconsole.backend.exports.agents import Uffd
from memconsole.backend.exports.fd import Hub
from memconsole.backend.exports.offer import Offer
from memconsole.backend.peers.handle import stat
from memconsole.errors import GuestError
from memconsole.model import Access

LONG_S = 60.0


class Met:
    """A hub with one guest, which is this process, and its connection; ``on_uffd`` waits until ``custody`` answers."""

    def __init__(self, path: Path) -> None:
        self.custody = threading.Event()
        self.handed: list[Uffd] = []
        self.hub = Hub(path, on_uffd=self._take)
        self.hub.register("db", os.getpid(), stat(os.getpid())[1])
        self.agent = knock(path)
        greet(self.agent)
        until(lambda: self.hub.connected("db"), "the agent is let in")

    def _take(self, uffd: Uffd) -> None:
        self.handed.append(uffd)
        assert self.custody.wait(LONG_S)

    def next(self) -> wire.Message:
        packet, fds, _, _ = socket.recv_fds(self.agent, wire.MAX_MESSAGE, 1)
        for fd in fds:
            os.close(fd)
        return wire.unpack(packet)

    def report(self, id: int) -> None:
        body = wire.REPORTED.pack(2, 1, 7, 0, 0, 0, 0, 0, 0, b"")
        self.agent.send(wire.pack(Type.REPORTED, id, body))

    def close(self) -> None:
        self.custody.set()
        self.agent.close()
        self.hub.close()


@pytest.fixture
def met() -> Iterator[Met]:
    with (
        tempfile.TemporaryDirectory(prefix="mc-") as directory,
        contextlib.closing(Met(Path(directory) / "agents")) as made,
    ):
        yield made


def test_one_that_does_not_answer_is_asked_for_one_report_however_often(met: Met) -> None:
    for _ in range(20):
        with pytest.raises(GuestError, match="said nothing"):
            met.hub.ask("db", Type.REPORT, 0.01)
    first = met.next()
    assert first.type is Type.REPORT
    met.agent.setblocking(False)
    with pytest.raises(BlockingIOError):
        met.next()
    met.agent.setblocking(True)
    said: list[int] = []
    asks = threading.Thread(target=lambda: said.append(met.hub.ask("db", Type.REPORT, LONG_S).progress.beats))  # type: ignore[union-attr]
    asks.start()
    met.report(first.id)
    until(lambda: not asks.is_alive() or _answers(met), "it is answered")
    asks.join()
    assert said == [7]


def _answers(met: Met) -> bool:
    """Answer a question that is there; false."""
    met.agent.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        met.report(met.next().id)
    met.agent.setblocking(True)
    return False


def test_what_a_guest_is_still_at_is_named(met: Met) -> None:
    with Path(os.devnull).open("wb") as file, pytest.raises(GuestError) as first:
        met.hub.ask("db", Type.SAVE, 0.01, file.fileno())
    assert first.value.why == "its agent said nothing for 0.01 s"
    with pytest.raises(GuestError, match=r"it has been at SAVE for \d"):
        met.hub.ask("db", Type.REPORT, 0.01)


def test_nobody_waits_for_the_custody_of_an_uffd_but_who_handed_it_over(met: Met) -> None:
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, 4096)
    mapped: list[bool] = []
    offer = Offer("g1", memory, 0, 4096, Access.RW, None, wants=1)
    offers = threading.Thread(target=lambda: mapped.append(met.hub.offer("db", offer, LONG_S)))
    offers.start()
    grant = met.next()
    assert grant.type is Type.GRANT
    handed = wire.pack(Type.HANDED, grant.id, struct.pack("<IIQ", 1, 0, 1 << 32))
    socket.send_fds(met.agent, [handed], [memory])
    until(lambda: bool(met.handed), "custody is asked")
    said: list[int] = []
    asks = threading.Thread(target=lambda: said.append(met.hub.ask("db", Type.REPORT, LONG_S).progress.beats))  # type: ignore[union-attr]
    asks.start()
    met.report(met.next().id)
    asks.join()
    assert (said, mapped) == ([7], [])
    met.custody.set()
    taken = met.next()
    assert (taken.type, taken.id) == (Type.TAKEN, grant.id)
    met.agent.send(wire.pack(Type.DONE, grant.id, wire.DONE.pack(0, 0, b"")))
    offers.join()
    os.close(memory)
    assert mapped == [True]
