"""Guests of a real libvirtd, adopted while they run, through a real kexec."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import lab

DISK = "[ -e /run/lab/firmware.bin ] && mkdir /run/guest && cp /run/lab/firmware.bin /run/guest"
"""What a host has on its disk before anything of ours begins."""


def test_libvirts_guests_go_on_in_the_next_kernel_on_the_memory_they_had(tmp_path: Path) -> None:
    """Twenty minutes of an emulated processor: libvirtd asks QEMU what it can in either kernel, beside its guests."""
    if not os.environ.get("MEMCONSOLE_SOAK"):
        pytest.skip("MEMCONSOLE_SOAK=1 runs it")
    if shutil.which("libvirtd") is None:
        pytest.skip("there is no libvirtd (libvirt-daemon-system, libvirt-clients)")
    said = lab.run("adopted", tmp_path, early=f"{DISK}\n{lab.RESUME}")
    said.check()
    assert said.stages == 2
