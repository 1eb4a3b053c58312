"""Who may act, who may look, and who is denied, by the credentials of real processes."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.served import Raw

from memconsole.backend import metrics
from memconsole.backend.control import Control
from memconsole.backend.custody import OwnCustody
from memconsole.backend.wire import places
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.embedded import Serving, serve_in_thread
from memconsole.backend.wire.loop import Limits
from memconsole.backend.wire.roles import Roles
from memconsole.errors import UsageError

NOBODY, NOGROUP = 65534, 65534
OPERATORS, VIEWERS = 1, 2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")


@pytest.fixture
def serving() -> Iterator[tuple[Serving, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="mc-roles-"))
    directory.chmod(0o755)
    control = Control(directory / "guests", OwnCustody())
    roles = Roles(grp.getgrgid(OPERATORS).gr_name, grp.getgrgid(VIEWERS).gr_name)
    handle = serve_in_thread(control, directory / "control", roles=roles, limits=Limits(per_user=4))
    handle.listen(places.bind(directory / "metrics"), metrics.Endpoint(handle.service))
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


HELLO = ("Hello", {"protocol": 1})
APPLY = ("Apply", {"action": {"do": "reserve", "name": "theirs", "size": 1 << 20}})
EVENTS = ("Events", {"after": 0})


def test_operators_act_and_the_ledger_says_who_it_was(serving: tuple[Serving, Path]) -> None:
    hello, apply, events = ask_as([OPERATORS], serving[1], HELLO, APPLY, EVENTS)
    assert (hello["parameters"]["role"], hello["parameters"]["read_only"]) == ("operator", "")
    assert apply["parameters"]["outcome"]["subject"] == "theirs"
    assert any(event["peer"].startswith(f"uid {NOBODY} pid ") for event in events["parameters"]["events"])


def test_viewers_look_and_do_not_act(serving: tuple[Serving, Path]) -> None:
    lend = ("OpenRegion", {"region": "any"})
    hello, shown, apply, lent = ask_as([VIEWERS], serving[1], HELLO, ("Plan", APPLY[1]), APPLY, lend)
    assert hello["parameters"]["role"] == "viewer"
    assert hello["parameters"]["read_only"]
    assert shown["parameters"]["plan"]["effects"]
    assert apply["error"] == lent["error"] == "io.memconsole.Denied"
    with contextlib.closing(Client(serving[1])) as root:
        assert [region.name for region in root.snapshot().regions] == []


def test_everybody_else_is_denied_by_name_and_it_is_recorded_once_a_minute(serving: tuple[Serving, Path]) -> None:
    for _ in range(3):
        replies = ask_as([], serving[1], HELLO, ("GetSnapshot", {}), EVENTS, APPLY)
        assert {reply["error"] for reply in replies} == {"io.memconsole.Denied"}
        assert all(reply["parameters"]["remedy"] for reply in replies)
    with contextlib.closing(Client(serving[1])) as root:
        end = time.monotonic() + 10
        while not root.events(0) and time.monotonic() < end:
            time.sleep(0.005)
        denied = [event for event in root.events(0) if event.kind == "denied"]
    assert len(denied) == 1
    assert denied[0].peer.startswith(f"uid {NOBODY} pid ")


def test_strangers_may_read_the_interface(serving: tuple[Serving, Path]) -> None:
    call = ("org.varlink.service.GetInterfaceDescription", {"interface": "io.memconsole"})
    assert "method GetSnapshot" in ask_as([], serving[1], call)[0]["parameters"]["description"]


def test_metrics_are_for_those_who_may_look(serving: tuple[Serving, Path]) -> None:
    def status() -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(serving[1].with_name("metrics")))
            sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            return sock.recv(20).decode()

    assert as_nobody([], status).startswith("HTTP/1.1 403")
    assert as_nobody([VIEWERS], status).startswith("HTTP/1.1 200")


def test_one_user_cannot_take_all_connections(serving: tuple[Serving, Path]) -> None:
    def take() -> str:
        raws = [Raw(serving[1]) for _ in range(5)]
        return str(raws[-1].receive()["parameters"]["code"])

    assert as_nobody([OPERATORS], take) == "TooManyClients"
    with contextlib.closing(Client(serving[1])) as root:
        assert root.snapshot().host.name


def test_a_group_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="no-such-group"):
        Roles(operators="no-such-group")
