"""Keepers for tests: built with sanitizers, started in the foreground on a socket of their own, and ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from support.waiting import LONG_S

SOURCE = Path(__file__).parents[2] / "memconsole" / "native" / "keeper.c"
CAP_SYS_BOOT = 22
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def build_sanitized(directory: Path) -> Path:
    """The keeper under ASan and UBSan."""
    compiler = shutil.which("cc")
    if compiler is None:
        import pytest  # scenarios of the lab import this module, and have none

        pytest.skip("no C compiler")
    program = directory / "keeper-sanitized"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", *SANITIZERS]
    subprocess.run([compiler, *flags, "-o", program, SOURCE], check=True)
    return program


@dataclass
class Running:
    """A keeper that runs; ``ended`` is its exit status and what it wrote to stderr."""

    process: subprocess.Popen[bytes]
    path: Path

    def ended(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=LONG_S)
        return self.process.returncode, err.decode()

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def drop_capability(number: int) -> None:
    """Take a capability out of the bounding set, so that even root does not have it after exec."""
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, number, 0, 0, 0):  # PR_CAPBSET_DROP
        raise OSError("PR_CAPBSET_DROP")


@contextlib.contextmanager
def running(program: Path | str, *, before: Callable[[], None] | None = None) -> Iterator[Running]:
    """A keeper in the foreground that may not boot another kernel; ``before`` is called in its process first."""

    def prepare() -> None:
        drop_capability(CAP_SYS_BOOT)
        if before is not None:
            before()

    with tempfile.TemporaryDirectory(prefix="keeper-") as directory:
        path = Path(directory) / "keeper"
        # threads do no harm to what it calls between fork and exec: system calls, no locks
        process = subprocess.Popen([program, "-f", path], stderr=subprocess.PIPE, preexec_fn=prepare)  # noqa: PLW1509
        try:
            deadline = time.monotonic() + LONG_S
            while not _listens(path):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the keeper did not start: {process.communicate(timeout=1)[1].decode()}")
                time.sleep(0.005)
            yield Running(process, path)
        finally:
            process.kill()
            process.communicate()


def _listens(path: Path) -> bool:
    """Whether a listening SOCK_SEQPACKET socket (type 0005, flag __SO_ACCEPTCON) is bound there (/proc/net/unix)."""
    for line in Path("/proc/net/unix").read_text().splitlines():
        words = line.split()
        if words[-1] == str(path) and words[3] == "00010000" and words[4] == "0005":
            return True
    return False
