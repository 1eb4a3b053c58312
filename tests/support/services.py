"""A ``memconsole serve`` of a test's own, in the foreground, with its keeper; nothing of it outlives the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from support.waiting import LONG_S

MEMCONSOLE = [sys.executable, "-c", "import sys; from memconsole.cli import main; sys.exit(main())"]


class Service:
    """One service after another in the same directories; ``guests`` are PIDs to be killed at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "run"
        self.path = self.runtime / "control"
        self.state = directory / "state"
        self.guests: set[int] = set()
        self.process: subprocess.Popen[str] | None = None

    def command(self, *more: str) -> list[str]:
        """``memconsole --socket PATH`` and more words."""
        return [*MEMCONSOLE, "--socket", str(self.path), *more]

    def start(
        self, *more: str, env: Mapping[str, str] | None = None, wait: bool = True, launcher: list[str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[str]:  # fmt: skip
        """A service in the foreground; with ``wait``, one that answers."""
        words = self.command("serve", "--foreground", "--state-dir", str(self.state), "--record", "0", *more)
        self.process = subprocess.Popen(
            [*(launcher or []), *words],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, pass_fds=pass_fds,
        )  # fmt: skip
        if wait:
            self.client().close()
        return self.process

    def client(self) -> Client:
        """A client of the service, once it answers."""
        deadline = time.monotonic() + LONG_S
        while True:
            try:
                return Client(self.path)
            except MemconsoleError:
                assert self.process is not None
                if self.process.poll() is not None:
                    raise AssertionError(f"the service ended: {self.process.communicate()[1]}") from None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal the service and wait; its exit status and what it logged."""
        assert self.process is not None
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, err

    def clean(self) -> None:
        """End the service, its guests and its keeper."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        for pid in self.guests | self._vmms():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(MemconsoleError), contextlib.closing(KeeperCustody(self.runtime / "keeper")) as keeper:
            os.kill(keeper.pid, signal.SIGKILL)

    def _vmms(self) -> set[int]:
        """The VMMs that it started, or memconsole-resume did after a rehearsal: their words name its directory."""
        names = [f"{self.runtime}/agents\0".encode(), f"unix:{self.runtime}/".encode()]
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if any(name in words for name in names):
                    found.add(int(process.name))
        return found


@contextlib.contextmanager
def services() -> Iterator[Service]:
    """A Service in short directories (a socket's path has 107 bytes at most)."""
    directory = Path(tempfile.mkdtemp(prefix="mc-"))
    service = Service(directory)
    try:
        yield service
    finally:
        service.clean()
        shutil.rmtree(directory)
