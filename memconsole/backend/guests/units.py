"""Services that systemd runs: which process a unit is, and how it is stopped, saved, and started again.

A unit is stopped by systemd, not by a signal of ours, or ``Restart=`` would start it again at once. With which signal
stands in the unit; where it is not the one that has the program save, a file of this boot says so::

    /run/systemd/system/UNIT.d/50-memconsole-save.conf      [Service] KillSignal=SIGUSR1, TimeoutStopSec=60

Sources: systemctl(1), systemd.kill(5), systemd.service(5).
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from memconsole.backend.custody.manager import ANSWER_S, MANAGER
from memconsole.errors import GuestError

DROP_IN = "50-memconsole-save.conf"


def shown(unit: str, *names: str) -> dict[str, str]:
    """Properties of a unit; one that systemd does not have is missing.

    Raises:
        GuestError: systemctl does not say.
    """
    done = _systemctl("show", "-p", ",".join(names), "--", unit)
    return dict(line.split("=", 1) for line in done.splitlines() if "=" in line)


def process(unit: str) -> int | None:
    """The PID of a unit's main process; None while it has none."""
    pid = shown(unit, "MainPID").get("MainPID", "0")
    return int(pid) if pid.isdecimal() and int(pid) else None


def start(unit: str, within: float) -> int:
    """Start a unit, which may run already; its main process.

    Raises:
        GuestError: it does not start, or has no main process.
    """
    _systemctl("start", "--", unit, within=within)
    pid = process(unit)
    if pid is None:
        why = "its unit has no main process (Type=oneshot, or it ended)"
        raise GuestError(f"unit {unit} does not run", why, f"systemctl status {unit}")
    return pid


def stop(unit: str, number: signal.Signals, within: float) -> None:
    """Have systemd stop a unit by this signal; it is not waited for.

    Raises:
        GuestError: systemd does not.
    """
    _with_signal(unit, number, within)
    _systemctl("stop", "--no-block", "--", unit)


def _with_signal(unit: str, number: signal.Signals, within: float) -> None:
    if shown(unit, "KillSignal").get("KillSignal") == str(int(number)):
        return
    file = Path(MANAGER) / f"{unit}.d" / DROP_IN
    text = f"[Service]\nKillSignal={number.name}\nTimeoutStopSec={within:g}\n"
    try:
        file.parent.mkdir(mode=0o755, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.parent.chmod(0o755)
        file.chmod(0o644)
    except OSError as error:
        raise GuestError(
            f"unit {unit} cannot be told to save",
            f"{file}: {error.strerror}",
            f"systemctl edit {unit}, and say KillSignal={number.name} below [Service]",
        ) from None
    _systemctl("daemon-reload")


def _systemctl(*words: str, within: float = ANSWER_S) -> str:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=within, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        why = "systemd does not run this host" if isinstance(error, FileNotFoundError) else str(error)
        raise GuestError(f"systemctl {words[0]} failed", why, "name the service by --exec instead") from None
    if done.returncode:
        what = f"systemctl {' '.join(word for word in words if word != '--')} failed"
        raise GuestError(what, done.stderr.strip()[-400:], f"systemctl status {words[-1]}")
    return done.stdout
