"""The shipped units under real systemds, over real kexecs: this machine's, one with an fd store, one that carries it.

The versions are those that install_debian.sh found; each run says which it was (``units``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import lab

FAULTS = "export LAB_DROPIN=Environment=MEMCONSOLE_FAULT=@/run/early.points"
ALL = ["all"] if os.environ.get("MEMCONSOLE_SOAK") else []


def early(least: int, directory: str) -> str:
    """What a lab begins with that goes on as a systemd of a version or newer: this machine's, else one unpacked."""
    own = "0 0"
    if shutil.which("systemctl") is not None:
        own = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False).stdout
    files = ""
    if int(own.split()[1]) < least:
        found = lab.cache() / directory
        if not (found / "version").is_file():
            pytest.skip(f"there is no systemd {least} or newer here: tools/install_debian.sh unpacks one")
        files = str(found)
    return f"export LAB_SYSTEMD={files}; {lab.SYSTEMD}"


@pytest.mark.group("systemd")
def test_units_keep_guests_over_kills_restarts_and_a_handoff(tmp_path: Path) -> None:
    faults = f"{FAULTS}; " if ALL else ""
    arguments = [*ALL, "faults"] if ALL else []
    said = lab.run("under_systemd", tmp_path, arguments=arguments, early=faults + early(1, ""))
    said.check()
    assert said.stages == 2


@pytest.mark.group("systemd")
def test_a_device_that_another_process_has_for_longer_than_it_is_waited_for(tmp_path: Path) -> None:
    """memconsole-resume gives up after a minute, names that process, and is started again until the device is free."""
    if not ALL:
        pytest.skip("MEMCONSOLE_SOAK=1 runs it")
    said = lab.run("under_systemd", tmp_path, arguments=["busy"], early=f"export LAB_HOLD=80; {early(1, '')}")
    said.check()
    assert said.of("busy")["restarts"] > 0


@pytest.mark.group("systemd-fdstore")
def test_the_fd_store_of_a_newer_systemd_has_custody(tmp_path: Path) -> None:
    said = lab.run("under_systemd", tmp_path, arguments=ALL, early=early(254, "systemd"))
    said.check()
    assert said.of("units")["version"] >= 254
    assert said.stages == 2


@pytest.mark.group("systemd-newest")
def test_a_kexec_that_systemd_makes_brings_the_memory_and_says_what_became_of_guests(tmp_path: Path) -> None:
    said = lab.run("under_systemd", tmp_path, arguments=[*ALL, "forced"], early=early(261, "systemd-newest"))
    said.check()
    assert said.of("units")["version"] >= 261
    assert said.of("came-whole")["stage"] == 2
    assert said.stages == 3
