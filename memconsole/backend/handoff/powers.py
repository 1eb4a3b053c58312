"""What a handoff has done outside of this process: live update preserves, an image is loaded, VMMs are started again.

All of it is here, so that every step, and all that is done when one fails, runs against a value that plays it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol, Self

from memconsole.backend.handoff import image, luo
from memconsole.errors import GuestError
from memconsole.native import program

RESUME_S = 120.0
"""Seconds memconsole-resume has to start every VMM of a rehearsal."""
_OK = {0, 4}


class OpenSession(Protocol):
    """A session of live update, open; see :class:`.luo.LuoSession`."""

    @property
    def fd(self) -> int:
        """The session's file, which stays the session's."""

    def preserve(self, fd: int, token: int) -> None:
        """Have ``fd`` handed over under ``token``."""

    def finish(self) -> None:
        """Tell the kernel that all of it was retrieved."""

    def __enter__(self) -> Self:
        """It is closed at the end."""

    def __exit__(self, *exception: object) -> None:
        """Close it; what custody holds of it stays."""


class Powers(Protocol):
    """The kernel and memconsole-resume, as a handoff uses them."""

    def create(self, session: str) -> OpenSession:
        """A new outgoing session; see :meth:`.luo.LuoSession.create`."""

    def adopt(self, fd: int) -> OpenSession:
        """The session behind an fd from custody, which it takes over; see :meth:`.luo.LuoSession.adopt`."""

    def load(self, kernel: str, initrd: str | None, line: str) -> None:
        """Load an image for the next jump; see :func:`.image.load`."""

    def unload(self) -> None:
        """Forget the loaded image; see :func:`.image.unload`."""

    def revive(self, runtime_dir: Path, plan: str) -> None:
        """Start every VMM of a ``plan`` in custody from what was saved.

        Raises:
            GuestError: nothing could be started.
        """


class _Host:
    """Those of the host that this process runs on."""

    def create(self, session: str) -> OpenSession:
        return luo.LuoSession.create(session)

    def adopt(self, fd: int) -> OpenSession:
        return luo.LuoSession.adopt(fd)

    def load(self, kernel: str, initrd: str | None, line: str) -> None:
        image.load(kernel, initrd, line)

    def unload(self) -> None:
        image.unload()

    def revive(self, runtime_dir: Path, plan: str) -> None:
        words = [program("memconsole-resume"), "--rehearse", "--runtime", str(runtime_dir.absolute()), "--plan", plan]
        done = subprocess.run(words, capture_output=True, text=True, timeout=RESUME_S, check=False)
        if done.returncode not in _OK:
            why = done.stderr.strip().splitlines()
            raise GuestError("the VMMs could not be started again", why[-1] if why else "", "their state is in custody")


HOST: Powers = _Host()
