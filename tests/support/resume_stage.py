"""memconsole-resume under ASan and UBSan on this host, with a keeper, and monitors that it talks to."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import pytest

from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.handoff import bootplan
from memconsole.backend.handoff.bootplan import BootPlan, Resume, Resumed, Start
from memconsole.backend.peers.handle import Handle
from memconsole.backend.steps import FAULT_VARIABLE
from memconsole.errors import NotFound
from support import keepers
from support.resume_program import FLAGS, SOURCES
from support.waiting import LONG_S

M = 1 << 20
STAYS = "import time; print('up', flush=True); time.sleep(600)"


def built(directory: Path) -> Path:
    """The program, in a directory."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = directory / "memconsole-resume"
    subprocess.run([compiler, *FLAGS, "-fno-sanitize-recover=all", "-o", path, *SOURCES], check=True)
    return path


class Stage:
    """A keeper with things in it, and what memconsole-resume makes of a plan with them."""

    def __init__(self, program: Path, keeper: keepers.Running, directory: Path) -> None:
        self.directory = directory
        self.custody = KeeperCustody(keeper.path)
        self._program = program
        self._runtime = keeper.path.parent
        self._started: list[Handle] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._started:
            handle.kill()
            handle.close()
        self.custody.close()

    def put(self, name: str, contents: bytes = b"") -> None:
        fd = os.memfd_create(name)
        os.write(fd, contents)
        self.custody.put(name, fd)
        os.close(fd)

    def start(self, guest: str, *words: str, fds: dict[str, int] | None = None, uid: int = 0, gid: int = 0) -> Start:
        """A guest's VMM; without words one that stays."""
        command = words or (sys.executable, "-c", STAYS)
        place = self.directory / "guests" / guest
        return Start(guest, command, str(place), str(place / "log"), tuple((fds or {}).items()), uid, gid)

    def log(self, guest: str) -> str:
        return (self.directory / "guests" / guest / "log").read_text()

    def resume(self, plan: BootPlan | bytes) -> tuple[int, str, Resume]:
        self.put(bootplan.MANIFEST, plan if isinstance(plan, bytes) else bootplan.encode(plan))
        with contextlib.suppress(NotFound):
            self.custody.drop(bootplan.RESUME)
        code, err = self.run()
        return code, err, self.record()

    def record(self) -> Resume:
        """What the last start that came to its end wrote down."""
        fd, _ = self.custody.get(bootplan.RESUME)
        resume = bootplan.read_resume(os.pread(fd, M, 0))
        os.close(fd)
        for guest in resume.guests:
            if guest.pid:
                self._started.append(Handle(guest.pid, guest.start_ticks))
        return resume

    def run(self, fault: str = "") -> tuple[int, str]:
        """One start of it, which dies at a fault point, or in turn at each that is not in a file yet (``@FILE``)."""
        command = [str(self._program), "--rehearse", "--runtime", str(self._runtime)]
        env = os.environ | ({FAULT_VARIABLE: fault} if fault else {})
        with tempfile.TemporaryFile("w+") as err:  # a pipe would be waited for by what it leaves behind when it dies
            done = subprocess.run(command, stdout=err, stderr=err, env=env, timeout=LONG_S, check=False)
            err.seek(0)
            said = err.read()
        assert "runtime error" not in said
        assert "Sanitizer" not in said
        return done.returncode, said


def of(resume: Resume, guest: str) -> Resumed:
    return next(found for found in resume.guests if found.guest == guest)


class Monitor(threading.Thread):
    """A QMP server with canned answers, one a line it hears; None is silence. ``wrong``: lines that it ``sees`` not."""

    def __init__(
        self,
        path: Path,
        answers: list[str | None],
        sees: Callable[[str], bool] = lambda _line: True,
        *,
        greets: bool = True,
    ) -> None:
        super().__init__(daemon=True)
        self.heard: list[str] = []
        self.wrong: list[str] = []
        self._answers = answers
        self._sees = sees
        self._greets = greets
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("r") as lines:
            if self._greets:
                connection.sendall(b'{"QMP": {}}\n{"event": "RESUME"}\n')
            for answer in self._answers:
                line = ""
                with contextlib.suppress(OSError):
                    line = lines.readline()
                if not line:
                    return
                self.heard.append(line.strip())
                if not self._sees(line):
                    self.wrong.append(line)
                if answer is not None:
                    with contextlib.suppress(OSError):  # it has heard enough
                        connection.sendall(answer.encode() + b"\n")
            with contextlib.suppress(OSError):
                lines.readline()

    def end(self) -> None:
        self.join(30)
        assert not self.is_alive()
        self._listener.close()


LINES = (('{"execute": "qmp_capabilities"}', "return"), ('{"execute": "query-status"}', '"running"'))


def vmms(stage: Stage, guest: str) -> list[int]:
    """The processes of a guest: those that run in its directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink() == stage.directory / "guests" / guest:
                found.append(int(path.name))
    return found
