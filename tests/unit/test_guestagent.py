"""A guest's agent that is a stranger: whatever it says, and however long it takes, the answer is a time or an error."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memconsole.backend.guests import commandline, guestagent
from memconsole.backend.guests.guestagent import Channel
from memconsole.errors import GuestError

Request = dict[str, Any]
Answer = Callable[[Request], bytes]
NOW = 1_790_000_000_000_000_000


@contextlib.contextmanager
def agent(answer: Answer) -> Iterator[Path]:
    """A stand-in for an agent of a guest: each request is answered by the test."""
    with tempfile.TemporaryDirectory(prefix="mc-") as directory, socket.socket(socket.AF_UNIX) as server:
        path = Path(directory) / "agent"
        server.bind(str(path))
        server.listen()
        over = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                peer, _ = server.accept()
                with peer, peer.makefile("rb") as lines:
                    for line in lines:
                        peer.sendall(answer(json.loads(line.lstrip(b"\xff"))))
                over.wait()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield path
        finally:
            over.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join(30)


def good(request: Request) -> bytes:
    command = request["execute"]
    if command == "guest-sync-delimited":
        return b'{"error": {"desc": "JSON parse error"}}\n\xff' + reply(request["arguments"]["id"])
    return reply(NOW if command == "guest-get-time" else {})


def reply(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def bad(raw: bytes) -> Answer:
    """It greets as it should, and answers everything else so."""
    return lambda request: good(request) if request["execute"] == "guest-sync-delimited" else raw


def test_the_time_is_asked_and_set() -> None:
    asked: list[Request] = []

    def answer(request: Request) -> bytes:
        asked.append(request)
        return good(request)

    with agent(answer) as path, Channel("vm", path, 30) as channel:
        assert channel.time() == NOW
        channel.set_time(NOW + 1)
    assert [each["execute"] for each in asked] == ["guest-sync-delimited", "guest-get-time", "guest-set-time"]
    assert asked[2]["arguments"] == {"time": NOW + 1}


def test_what_was_meant_for_somebody_before_is_read_away() -> None:
    def answer(request: Request) -> bytes:
        if request["execute"] == "guest-sync-delimited":
            return b"\xff" + reply(7) + b"half a li" + b"\xff" + reply(request["arguments"]["id"])
        return good(request)

    with agent(answer) as path, Channel("vm", path, 30) as channel:
        assert channel.time() == NOW


@pytest.mark.parametrize(
    "raw",
    [
        b"\n",
        b"nothing of the kind\n",
        b"[" * 60_000 + b"\n",
        b'{"return": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        b'{"return": "noon"}\n',
        b'{"return": -1}\n',
        b'{"return": 1e300}\n',
        b'{"return": ' + b"9" * 4000 + b"}\n",
        b'{"return": null}\n',
        b"{}\n",
        b"\xff\xfe\n",
        b'{"error": {"desc": 7}}\n',
        b'{"error": {"class": "GenericError", "desc": "no"}}\n',
    ],
)
def test_an_answer_that_is_no_time_is_an_error(raw: bytes) -> None:
    with agent(bad(raw)) as path, Channel("vm", path, 30) as channel, pytest.raises(GuestError) as caught:
        channel.time()
    assert "vm" in str(caught.value)


def test_words_of_a_guest_are_shown_escaped_and_short() -> None:
    told = json.dumps({"error": {"desc": "\x1b]0;owned\x07\x1b[2J\n" + "x" * 50_000}}).encode() + b"\n"
    with agent(bad(told)) as path, Channel("vm", path, 30) as channel, pytest.raises(GuestError) as caught:
        channel.set_time(NOW)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 300
    assert "owned" in said


def test_one_that_says_nothing_is_given_up_in_time() -> None:
    began = time.monotonic()
    with agent(lambda _: b"") as path, pytest.raises(GuestError, match=r"no answer within 0\.2 s"):
        Channel("vm", path, 0.2)
    assert time.monotonic() - began < 60


def test_one_that_never_ends_its_line_is_given_up() -> None:
    endless = bad(b"x" * (1 << 20))
    with agent(endless) as path, Channel("vm", path, 30) as channel, pytest.raises(GuestError, match="more than"):
        channel.time()


def test_one_that_never_says_the_right_number_is_given_up_in_time() -> None:
    def answer(request: Request) -> bytes:
        return (b"\xff" + reply(1)) * 100

    with agent(answer) as path, pytest.raises(GuestError, match=r"no answer within 0\.3 s"):
        Channel("vm", path, 0.3)


def test_a_channel_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="No such file"):
        Channel("vm", tmp_path / "agent", 1)


def test_what_is_shown_is_printable() -> None:
    assert guestagent.shown("a\nb\x1b[1m") == "a?b?[1m"
    assert guestagent.shown("x" * 1000).endswith("...")


OPERATORS = (
    "-device", "virtio-serial",
    "-chardev", "socket,id=c1,path=/run/vm,,1/ga.sock,server=on,wait=off",
    "-device", "virtserialport,chardev=c1,name=org.qemu.guest_agent.0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (OPERATORS, "/run/vm,1/ga.sock"),
        (
            (
                *("-chardev", "socket,path=ga,server,nowait,id=x"),
                *("-device", '{"driver": "virtserialport", "chardev": "x", "name": "org.qemu.guest_agent.0"}'),
            ),
            "ga",
        ),
        (commandline.with_agent(Path("/run/a,b")), "/run/a,b/agent"),
        ((), None),
        (OPERATORS[:4], None),
        ((*OPERATORS[:5], "virtserialport,chardev=c1,name=com.redhat.spice.0"), None),
        ((*OPERATORS[:3], "socket,id=c1,path=/x", *OPERATORS[4:]), None),  # QEMU is the client there
        ((*OPERATORS[:3], "socket,id=c1,path=x,server=on,abstract=on", *OPERATORS[4:]), None),
        ((*OPERATORS[:3], "pty,id=c1", *OPERATORS[4:]), None),
    ],
)
def test_the_channel_is_found_in_the_command_line(words: tuple[str, ...], path: str | None) -> None:
    assert commandline.agent_channel(["qemu", *words]) == path
