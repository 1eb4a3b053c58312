"""A service that is killed: its clients are told, and find the next one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.waiting import LONG_S

from memconsole import actions
from memconsole.backend.wire.client import Client
from memconsole.errors import NoControl

SERVICE = """
import sys, time
sys.path.insert(0, "tests")
from support.served import ServedSource
from memconsole.backend.wire.serving import serve_in_thread
class Slow(ServedSource):
    def apply(self, action, *, peer=""):
        print("applying", flush=True)
        time.sleep(60)
serving = serve_in_thread(Slow(), sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def service(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVICE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_kill_ends_calls_and_streams_by_name_and_the_next_one_is_found(tmp_path: Path) -> None:
    path = tmp_path / "control"
    errors: dict[str, NoControl] = {}

    def until_killed(what: str) -> None:
        try:
            if what == "apply":
                client.apply(actions.Reserve("x", 4096))
            elif what == "follow":
                list(client.follow(10**9))
            else:
                for _ in client.watch(0.25):
                    watching.set()
        except NoControl as error:
            errors[what] = error

    watching = threading.Event()
    with service(path) as process:
        client = Client(path)
        threads = [threading.Thread(target=until_killed, args=(what,)) for what in ("apply", "follow", "watch")]
        for thread in threads:
            thread.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "applying\n"
        assert watching.wait(LONG_S)
        process.kill()
        for thread in threads:
            thread.join(10)
    assert {what: error.code for what, error in errors.items()} == dict.fromkeys(
        ("apply", "follow", "watch"), "ControlDied"
    )
    assert "wholly" in errors["apply"].remedy
    with pytest.raises(NoControl) as caught:
        client.snapshot()
    assert caught.value.code == "StaleSocket"
    with service(path):  # the socket left behind is replaced
        assert client.snapshot().regions
    client.close()
