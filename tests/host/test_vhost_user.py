"""A process that a QEMU hands its memory to works for that guest, and is known without being named."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from support import vhost_backend
from support.controls import M, controls, guest, runtime_dir
from support.guests import Obedient
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.guests.commandline import BINARY
from memconsole.model import GuestState, Severity

pytestmark = pytest.mark.skipif(shutil.which(BINARY) is None, reason=f"{BINARY} is not installed")

MAPPER = """
import mmap, os, socket, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, 4096)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[2])
connection.close()
print("maps", flush=True)
sys.stdin.read()
"""


def started(control: Control, path: Path) -> None:
    """A QEMU with a disk that a backend at ``path`` serves; its firmware looks for something to boot there."""
    disk = ("-chardev", f"socket,id=c,path={path}", "-device", "vhost-user-blk-pci,chardev=c,bootindex=0")
    control.apply(do.GuestStart("vm", vmm="qemu", memory=32 * M, args=disk))


def test_a_vhost_user_backend_is_a_helper_of_its_guest() -> None:
    with controls() as control, runtime_dir() as directory:
        path = directory / "disk"
        with Obedient([sys.executable, vhost_backend.__file__, path]) as backend:
            assert backend.line() == "listens"
            started(control, path)
            assert backend.line().startswith("mapped ")
            shown = control.snapshot()
            assert shown.findings == ()
            seen = guest(shown, "vm").seen
            assert seen is not None
            assert [each.pid for each in seen.helpers] == [backend.pid]
            assert seen.helpers[0].command[-1] == str(path)
            assert guest(shown, "vm").helpers == ()
            control.apply(do.GuestStop("vm"))


def test_one_that_maps_it_and_is_not_connected_is_an_intruder(tmp_path: Path) -> None:
    with controls() as control, socket.socket(socket.AF_UNIX) as elsewhere:
        control.apply(do.GuestStart("vm", vmm="qemu", memory=32 * M))
        elsewhere.bind(str(tmp_path / "s"))
        elsewhere.listen()
        (fd,) = control._desk.fds("vm")
        with Obedient([sys.executable, "-c", MAPPER, f"/proc/{os.getpid()}/fd/{fd}", tmp_path / "s"]) as intruder:
            assert intruder.line() == "maps"
            shown = control.snapshot()
            assert [(found.id, found.severity) for found in shown.findings] == [("mapping-unknown", Severity.ERROR)]
            assert f"process {intruder.pid} " in shown.findings[0].observed
            assert guest(shown, "vm").state is GuestState.RUNNING
            seen = guest(shown, "vm").seen
            assert seen is not None
            assert seen.helpers == ()
        until(lambda: control.snapshot().findings == (), "it is gone")
        control.apply(do.GuestStop("vm"))
