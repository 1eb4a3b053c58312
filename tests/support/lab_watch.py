"""Whether a lab that runs still goes on: three signs, and how long each may be missing.

said        its console and its verdicts grow
alive       a shell in the lab counts in ``/run/lab/alive``: its kernel runs processes
wants       QEMU runs, or waits for a processor (which a busy machine may keep from it for long); it does not run for
            minutes with nothing to show for it

QEMU's emulation sometimes loses the interrupt that its guest waits for, AMD-V's above all: the lab is *deaf* then,
nothing in it runs any more, and it is booted again from the start. Where the lab's kernel lives and a scenario says
nothing, the fault is in what is tested: that is *silence*, and it fails.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from memconsole.backend.peers.patience import Patience

ASLEEP_S = 120.0
"""Seconds in which nothing in the lab runs, and QEMU neither: a lab that lives counts every few seconds."""
MOST = 10
"""A QEMU that waits for a processor is waited for so many times as long."""
BUSY_S = 300.0
"""Seconds of processor time that QEMU may take while nothing in the lab runs: from a jump to userland are 40."""
QUIET_S = 1500.0
"""Seconds in which nothing is said: the longest step of a scenario takes a minute on an idle machine."""
LOOK_S = 1.0
DEAF, SILENT = "nothing in the lab ran any more", "the lab said nothing any more, and its kernel was alive"
COUNTS = "{ while :; do read -r up </proc/uptime; echo $up >/run/lab/alive; sleep 5; done; } 2>/dev/null &\n"
"""What a stage of the lab begins with, and leaves running."""


class Watch:
    """One QEMU and the directory that it shares."""

    def __init__(self, qemu: subprocess.Popen[bytes], share: Path) -> None:
        self._qemu, self._share = qemu, share
        self._said, self._alive = self._signs()
        self._told = time.monotonic()
        self._patience = Patience(qemu.pid, ASLEEP_S, most=MOST)
        self._process, self._took = psutil.Process(qemu.pid), 0.0

    def ends(self) -> str:
        """Wait until QEMU ends (empty), or the lab is one of these."""
        while self._qemu.poll() is None:
            said, alive = self._signs()
            if (said, alive) != (self._said, self._alive):
                self._patience = Patience(self._qemu.pid, ASLEEP_S, most=MOST)
                self._took = self._takes()
            if said != self._said:
                self._told = time.monotonic()
            self._said, self._alive = said, alive
            if not self._patience.left() or self._takes() - self._took > BUSY_S:
                return DEAF
            if time.monotonic() - self._told > QUIET_S:
                return SILENT
            time.sleep(LOOK_S)
        return ""

    def _takes(self) -> float:
        """Seconds of processor time that QEMU has taken; of one that has just ended, what is no reason."""
        try:
            times = self._process.cpu_times()
        except psutil.NoSuchProcess:
            return self._took
        return float(times.user + times.system)

    def _signs(self) -> tuple[list[int], str]:
        said = [_size(self._share / name) for name in ("console", "verdicts", "booted")]
        alive = self._share / "alive"
        return said, alive.read_text() if alive.exists() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1
