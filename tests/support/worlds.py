"""A keeper and a runtime directory, in which control processes come, die at a fault point, and come again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from memconsole import action_input, native
from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.kernel import census
from memconsole.backend.ledger.opening import LEDGER
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.errors import MemconsoleError
from support import keepers
from support.controls import ours, runtime_dir
from support.waiting import LONG_S

CHILD = f"""
import json, os, sys
from pathlib import Path
from memconsole import action_input
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
control = Control(Path(sys.argv[1]), KeeperCustody(Path(sys.argv[2])))
for guest in sys.argv[5:]:
    assert control._desk.connected(guest)
os.environ["{FAULT_VARIABLE}"] = sys.argv[4]
control.apply(action_input.decode(json.loads(sys.argv[3])))
print("survived")
control.close()
"""

WAITING = f"""
import os, sys, time
from pathlib import Path
os.environ["{FAULT_VARIABLE}"] = sys.argv[3]
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
control = Control(Path(sys.argv[1]), KeeperCustody(Path(sys.argv[2])))
print("waits", flush=True)
sys.stdin.read()
print("survived")
control.close()
"""


class World(NamedTuple):
    """A keeper and a runtime directory; control processes come and go."""

    runtime: Path
    keeper: Path
    prelude: str = ""
    """What those that die run first."""

    @contextlib.contextmanager
    def control(self) -> Iterator[Control]:
        with contextlib.closing(Control(self.runtime, KeeperCustody(self.keeper))) as control:
            yield control

    def dies(self, action: do.Action, at: str, *connected: str) -> None:
        """Apply an action in a process of its own, once these guests' agents are back, that dies at a fault point."""
        places = str(self.runtime), str(self.keeper)
        words = [
            sys.executable,
            "-c",
            self.prelude + CHILD,
            *places,
            json.dumps(action_input.encode(action)),
            at,
            *connected,
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, (at, done.stdout, done.stderr)

    def dies_when(self, happens: Callable[[], None], at: str) -> None:
        """Let something happen to one in a process of its own that kills itself at a fault point it is led to so."""
        words = [sys.executable, "-c", WAITING, str(self.runtime), str(self.keeper), at]
        with subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "waits\n"
                happens()
                assert process.wait(LONG_S) == -signal.SIGKILL, at
            finally:
                process.kill()

    def processes(self) -> list[int]:
        """The guests' processes, whoever knows of them."""
        found = []
        for pid in census.take().processes:
            with contextlib.suppress(MemconsoleError):
                if any(str(self.runtime) in word for word in census.command("/", pid)):
                    found.append(pid)
        return [pid for pid in found if pid not in {os.getpid(), *_keepers(self.keeper)}]

    def essence(self, control: Control) -> tuple[object, ...]:
        """What there is, by name, in the Snapshot, in custody and among processes."""
        snapshot = control.snapshot()
        return (
            [(found.name, found.state) for found in snapshot.regions],
            [(found.name, found.state) for found in snapshot.guests if found.name in ours(snapshot)],
            [(found.id, found.region, found.guest, len(found.seen)) for found in snapshot.grants],
            [name for name in control._desk.custody.names() if name != LEDGER],
            len(self.processes()),
        )


def _keepers(path: Path) -> set[int]:
    return {pid for pid in census.take().processes if str(path) in _words(pid)}


def _words(pid: int) -> str:
    with contextlib.suppress(MemconsoleError):
        return " ".join(census.command("/", pid))
    return ""


@contextlib.contextmanager
def worlds(prelude: str = "") -> Iterator[World]:
    with runtime_dir() as directory, keepers.running(native.program("memconsole-keeper")) as keeper:
        world = World(directory / "run", keeper.path, prelude)
        try:
            yield world
        finally:
            for pid in world.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
