"""Who may act, who may look, and who is denied, by the credentials of real processes."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import select
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import Raw
from support.waiting import LONG_S

from memconsole.backend.control import Control
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.peers.peer import ConnectionLimits
from memconsole.backend.wire import metrics, sockets
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.loop import Limits
from memconsole.backend.wire.protocol import PROTOCOL
from memconsole.backend.wire.roles import Roles
from memconsole.backend.wire.serving import RunningService, serve_in_thread
from memconsole.errors import UsageError

NOBODY, NOGROUP = 65534, 65534
OPERATORS, VIEWERS = 1, 2
LIMITS = Limits(shares=ConnectionLimits((6, 12, 18), per_user=4, per_stranger=3), strangers_idle_s=2.0)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")


@pytest.fixture
def serving() -> Iterator[tuple[RunningService, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="mc-roles-"))
    directory.chmod(0o755)
    control = Control(directory / "guests", OwnCustody())
    roles = Roles(grp.getgrgid(OPERATORS).gr_name, grp.getgrgid(VIEWERS).gr_name)
    handle = serve_in_thread(control, directory / "control", roles=roles, limits=LIMITS)
    handle.listen(sockets.bind(directory / "metrics"), metrics.Endpoint(handle.service))
    yield handle, directory / "control"
    handle.close()
    control.close()
    shutil.rmtree(directory)


def as_nobody(groups: list[int], do: Callable[[], Any]) -> Any:
    """What ``do`` returns, as JSON, in a process of user nobody with these supplementary groups."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child makes no use of them
        pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(NOGROUP)
            os.setuid(NOBODY)
            os.write(writing, json.dumps(do()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return json.loads(said)


def ask_as(groups: list[int], path: Path, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The replies to calls of such a process."""

    def ask() -> list[dict[str, Any]]:
        replies = []
        with Raw(path) as raw:
            for method, parameters in calls:
                raw.call(method if "." in method else f"io.memconsole.{method}", **parameters)
                replies.append(raw.receive())
        return replies

    found: list[dict[str, Any]] = as_nobody(groups, ask)
    return found


HELLO = ("Hello", {"protocol": PROTOCOL})
APPLY = ("Apply", {"action": {"do": "reserve", "name": "theirs", "size": 1 << 20}})
EVENTS = ("Events", {"after": 0})


def test_operators_act_and_the_ledger_says_who_it_was(serving: tuple[RunningService, Path]) -> None:
    hello, apply, events = ask_as([OPERATORS], serving[1], HELLO, APPLY, EVENTS)
    assert (hello["parameters"]["role"], hello["parameters"]["read_only"]) == ("operator", "")
    assert apply["parameters"]["outcome"]["subject"] == "theirs"
    assert any(event["peer"].startswith(f"uid {NOBODY} pid ") for event in events["parameters"]["events"])


def test_viewers_look_and_do_not_act(serving: tuple[RunningService, Path]) -> None:
    lend = ("OpenRegion", {"region": "any"})
    hello, shown, apply, lent = ask_as([VIEWERS], serving[1], HELLO, ("Plan", APPLY[1]), APPLY, lend)
    assert hello["parameters"]["role"] == "viewer"
    assert hello["parameters"]["read_only"]
    assert shown["parameters"]["plan"]["effects"]
    assert apply["error"] == lent["error"] == "io.memconsole.Denied"
    with contextlib.closing(Client(serving[1])) as root:
        assert [region.name for region in root.snapshot().regions] == []


def test_viewers_name_no_files_but_kernels(serving: tuple[RunningService, Path], tmp_path: Path) -> None:
    """Whether a file is there, what it is and what is in it makes no difference to what they are told."""
    fifo, empty, kernel = tmp_path / "fifo", tmp_path / "empty", tmp_path / "kernel"
    os.mkfifo(fifo, 0o666)
    empty.write_bytes(b"")
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(1000))
    paths = [fifo, empty, kernel, tmp_path / "none", Path("/etc/shadow"), Path("/dev/null")]
    calls = [
        ("Plan", {"action": {"do": "handoff-run", field: str(path)}})
        for path in paths
        for field in ("kernel", "initrd")
    ]
    replies = ask_as([VIEWERS], serving[1], *calls)
    assert {reply["error"] for reply in replies} == {"io.memconsole.Denied"}
    asked = [call[1]["action"].get("kernel") or call[1]["action"]["initrd"] for call in calls]
    told = {json.dumps(reply).replace(path, "X") for reply, path in zip(replies, asked, strict=True)}
    assert len(told) == 1


def test_plans_that_name_what_is_no_file_keep_nobody_waiting(
    serving: tuple[RunningService, Path], tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o666)
    plan = ("Plan", {"action": {"do": "handoff-run", "kernel": str(fifo), "initrd": str(fifo)}})
    replies = ask_as([OPERATORS], serving[1], *[plan] * 8, ("GetSnapshot", {}))
    assert "snapshot" in replies[-1]["parameters"]
    for reply in replies[:-1]:
        refusals = reply["parameters"]["plan"]["refusals"]
        (unread,) = (refusal for refusal in refusals if refusal["code"] == "ImageUnreadable")
        assert "not a regular file" in unread["what"]


def test_everybody_else_is_denied_by_name_and_it_is_recorded_once_a_minute(
    serving: tuple[RunningService, Path],
) -> None:
    for _ in range(3):
        replies = ask_as([], serving[1], HELLO, ("GetSnapshot", {}), EVENTS, APPLY)
        assert {reply["error"] for reply in replies} == {"io.memconsole.Denied"}
        assert all(reply["parameters"]["remedy"] for reply in replies)
    with contextlib.closing(Client(serving[1])) as root:
        end = time.monotonic() + LONG_S
        while not root.events(0) and time.monotonic() < end:
            time.sleep(0.005)
        denied = [event for event in root.events(0) if event.kind == "denied"]
    assert len(denied) == 1
    assert denied[0].peer.startswith(f"uid {NOBODY} pid ")


def test_strangers_may_read_the_interface(serving: tuple[RunningService, Path]) -> None:
    call = ("org.varlink.service.GetInterfaceDescription", {"interface": "io.memconsole"})
    assert "method GetSnapshot" in ask_as([], serving[1], call)[0]["parameters"]["description"]


def test_metrics_are_for_those_who_may_look(serving: tuple[RunningService, Path]) -> None:
    def status() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(serving[1].with_name("metrics")))
            sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return sock.recv(20).decode()

    assert as_nobody([], status).startswith("HTTP/1.1 403")
    assert as_nobody([VIEWERS], status).startswith("HTTP/1.1 200")


def test_one_user_cannot_take_all_connections(serving: tuple[RunningService, Path]) -> None:
    def take() -> str:
        raws = [Raw(serving[1]) for _ in range(5)]
        return str(raws[-1].receive()["parameters"]["code"])

    assert as_nobody([OPERATORS], take) == "TooManyClients"
    with contextlib.closing(Client(serving[1])) as root:
        assert root.snapshot().host.name


def held_by(uids: range, groups: list[int], path: Path, each: int) -> list[int]:
    """Processes of so many users, each with idle connections, until they are killed."""
    pids = []
    for uid in uids:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.setgroups(groups)
            os.setgid(NOGROUP)
            os.setuid(uid)
            kept = [Raw(path) for _ in range(each)]
            os.write(writing, b"%d" % len(kept))
            time.sleep(120)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            assert said.read(1)
        pids.append(pid)
    return pids


def end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_many_users_without_a_role_keep_nobody_out_who_has_one(serving: tuple[RunningService, Path]) -> None:
    """As one user has them by subordinate uids; viewers leave room for operators, and both for root."""
    holding = held_by(range(70_000, 70_009), [], serving[1], each=4)
    try:
        assert ask_as([VIEWERS], serving[1], HELLO)[0]["parameters"]["role"] == "viewer"
        holding += held_by(range(70_020, 70_024), [VIEWERS], serving[1], each=4)
        assert ask_as([OPERATORS], serving[1], HELLO)[0]["parameters"]["role"] == "operator"
        with contextlib.closing(Client(serving[1])) as root:
            assert root.snapshot().host.name
    finally:
        end(holding)


def test_idle_connections_without_a_role_end_and_those_with_one_do_not(serving: tuple[RunningService, Path]) -> None:
    def idle() -> bool:
        with Raw(serving[1]) as raw:
            return select.select([raw.sock], [], [], 8.0)[0] != []

    assert as_nobody([], idle)
    assert not as_nobody([VIEWERS], idle)


def test_a_message_without_a_role_is_short(serving: tuple[RunningService, Path]) -> None:
    def long() -> str:
        with Raw(serving[1]) as raw:
            raw.sock.sendall(b"x" * (1 << 17))
            return str(raw.receive()["parameters"]["code"])

    assert as_nobody([], long) == "TooLarge"


def test_a_group_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="no-such-group"):
        Roles(operators="no-such-group")
