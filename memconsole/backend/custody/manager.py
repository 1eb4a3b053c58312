"""The service manager of this host, where it is systemd: what it would lose at a jump, and what it must not do.

``systemctl kexec`` ends every guest, and with systemd before 261 the memory too. Stopping it half way would leave a
host without its services, so it is refused before it begins: while there is anything to lose, ``kexec.target`` requires
a unit that does not exist, and whose name says what to do. That is a file of this boot (``/run``): it stays when the
control process is killed, and is taken away with the last guest and region.

    /run/systemd/system/kexec.target.d/50-memconsole.conf      [Unit] Requires=memconsole-has-guests:...

Nothing that asks for the unit gets past it (``systemctl kexec``, ``isolate``, logind's reboot of a loaded kernel);
``systemctl kexec --force`` and ``kexec -e`` ask nobody. Sources: systemctl(1), systemd.unit(5), systemd.special(7).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from memconsole import wholefile
from memconsole.backend.kernel import tree

MANAGER = "/run/systemd/system"
"""There where systemd is the service manager (sd_booted(3))."""
UNIT = "memconsole-has-guests:use-memconsole-handoff-run.service"
"""A unit that never exists; systemctl says its name when it refuses."""
DROP_IN = "kexec.target.d/50-memconsole.conf"
TEXT = f"""# Guests or regions of memconsole are here: an ordinary kexec ends them, memconsole handoff run carries them.
# This is taken away with the last of them. systemctl kexec --force passes it by.
[Unit]
Requires={UNIT}
"""
ANSWER_S = 10.0
"""Seconds systemctl has to answer."""
_OUTLIVES = {"yes", "on-success"}


class UnitFdStore(NamedTuple):
    """A unit's fd store that outlives a stop of the unit; ``held`` descriptors are in it."""

    unit: str
    held: int


def manages(root: tree.Root = "/") -> bool:
    """Whether systemd is the service manager here."""
    return Path(tree.below(root, MANAGER)).is_dir()


def stores(but: Sequence[str] = ()) -> tuple[UnitFdStore, ...]:
    """The fd stores that outlive a stop of their unit (``FileDescriptorStorePreserve=``), of all units but those named.

    Raises:
        OSError, subprocess.SubprocessError: systemctl did not say.
    """
    words = ["systemctl", "show", "*.service", "-p", "Id,NFileDescriptorStore,FileDescriptorStorePreserve"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_S, check=True)
    found = []
    for block in done.stdout.split("\n\n"):
        of = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        count = int(of.get("NFileDescriptorStore", "0") or "0")
        if count and of.get("FileDescriptorStorePreserve") in _OUTLIVES and of["Id"] not in but:
            found.append(UnitFdStore(of["Id"], count))
    return tuple(sorted(found))


def own_unit(root: tree.Root = "/") -> str:
    """The unit this process belongs to, by its cgroup; empty where it has none."""
    try:
        return tree.line(root, "/proc/self/cgroup").rpartition("/")[2]
    except tree.UNREADABLE:
        return ""


class KexecGuard:
    """Keeps an ordinary kexec from beginning while there is something to lose; ``why_not`` says why it cannot."""

    def __init__(self, root: tree.Root = "/") -> None:
        self._file = Path(tree.below(root, MANAGER)) / DROP_IN
        self._manages = manages(root) and os.access(tree.below(root, MANAGER), os.W_OK)
        self._on: bool | None = None
        self.why_not = ""

    def keep(self, *, on: bool) -> None:
        """See that an ordinary kexec is refused, or not; what is so already costs nothing."""
        if not self._manages or on is self._on:
            return
        try:
            self._write() if on else self._remove()
            self._read_anew()
        except (OSError, subprocess.SubprocessError) as error:
            self.why_not = f"{self._file}: {error}"
        else:
            self._on, self.why_not = on, ""

    def _write(self) -> None:
        self._file.parent.mkdir(mode=0o755, exist_ok=True)
        self._file.parent.chmod(0o755)
        with wholefile.written(self._file, mode=0o644) as file:
            file.write(TEXT.encode())

    def _remove(self) -> None:
        self._file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is none, or somebody else has a file there
            self._file.parent.rmdir()

    def _read_anew(self) -> None:
        """A manager that has the unit in its memory already reads it again."""
        show = ["systemctl", "show", "--value", "-p", "NeedDaemonReload", "kexec.target"]
        needs = subprocess.run(show, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        if needs.stdout.strip() == "yes":
            subprocess.run(["systemctl", "daemon-reload"], capture_output=True, timeout=ANSWER_S, check=True)
