"""The shipped units under a real systemd, over a real kexec."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import lab
import pytest

FAULTS = "export LAB_DROPIN=Environment=MEMCONSOLE_FAULT=@/run/early.points"


def other() -> Path | None:
    """The files of a systemd with an fd store that outlives a stop (254), where install_debian.sh put them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = cache / "memconsole" / "lab" / "systemd"
    return found if (found / "lib/systemd/systemd").exists() else None


@pytest.mark.rotating("systemd")
def test_units_keep_guests_over_kills_restarts_and_a_handoff(tmp_path: Path) -> None:
    if not Path("/lib/systemd/systemd").exists():
        pytest.skip("this machine has no systemd (Debian: systemd)")
    said = lab.run("under_systemd", tmp_path, timeout=900, arguments=["faults"], early=f"{FAULTS}; {lab.SYSTEMD}")
    said.check()
    assert said.stages == 2


@pytest.mark.rotating("systemd-fdstore")
def test_the_fd_store_of_a_newer_systemd_has_custody(tmp_path: Path) -> None:
    files = other()
    own = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout.split()
    if files is None and (shutil.which("systemctl") is None or int(own[1]) < 254):
        pytest.skip("there is no systemd 254 or newer here (tools/install_debian.sh)")
    early = f"export LAB_SYSTEMD={files or ''}; {lab.SYSTEMD}"
    said = lab.run("under_systemd", tmp_path, timeout=900, early=early)
    said.check()
    assert said.stages == 2
