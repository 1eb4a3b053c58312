"""A stock QEMU, started by hand, whose memory is a file of the mount."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import controls
from support.mounted import Place, places, unexpected
from support.waiting import LONG_S, until

from memconsole import actions as do
from memconsole.model import GrantState, Rung

M = controls.M
RAM = 32 * M


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


def qmp(path: Path, command: str) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(LONG_S)
        monitor.connect(str(path))
        with monitor.makefile("rw") as lines:
            lines.readline()
            for each in ("qmp_capabilities", command):
                lines.write(json.dumps({"execute": each}) + "\n")
                lines.flush()
                while "event" in (reply := json.loads(lines.readline())):
                    pass
    answer: dict[str, Any] = reply["return"]
    return answer


def running(path: Path) -> bool:
    try:
        return bool(qmp(path, "query-status")["running"])
    except (OSError, json.JSONDecodeError):
        return False


def test_a_stock_qemu_started_by_hand_on_the_path(place: Place) -> None:
    """As docs/service.md has it: a shell is attached, gets its grant, and becomes QEMU."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    monitor = place.service.directory / "qmp"
    path = place.path("vm", "vmram")
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    words += ["-machine", "q35,memory-backend=ram", "-m", f"size={RAM}B", "-qmp", f"unix:{monitor},server=on,wait=off"]
    words += ["-object", f"memory-backend-file,id=ram,size={RAM},mem-path={path},share=on,align=2M"]
    with subprocess.Popen(["sh", "-c", 'read go; exec "$@"', "sh", *words], stdin=subprocess.PIPE, text=True) as qemu:
        try:
            place.client.apply(do.Reserve("vmram", RAM))
            place.client.apply(do.GuestAttach("vm", qemu.pid))
            place.client.apply(do.Map("vmram", "vm", gpa=0))
            assert qemu.stdin is not None
            qemu.stdin.write("\n")
            qemu.stdin.flush()
            until(lambda: running(monitor), "QEMU's monitor")
            shown = place.shown()
            assert (shown.grants[0].state, shown.grants[0].export) == (GrantState.MAPPED, "file")
            guest = controls.guest(shown, "vm")
            assert guest.seen is not None
            assert [(block.region, block.gpa) for block in guest.seen.ram if block.region] == [("vmram", 0)]
            place.restart()
            place.kill_server()
            place.restart()
            qmp(monitor, "system_reset")
            assert running(monitor), "it keeps its memory"
            shown = place.shown()
            assert [seen.pid for seen in shown.grants[0].seen] == [qemu.pid]
            assert not unexpected(shown)
            assert place.revoke().rung in {Rung.COPY, Rung.KILL}
            with contextlib.suppress(OSError, json.JSONDecodeError):
                qmp(monitor, "system_reset")
            assert qemu.wait(LONG_S) == -signal.SIGBUS
            assert place.shown().grants == ()
        finally:
            qemu.kill()


def test_a_stock_qemu_gives_parts_of_a_grant_back_by_virtio_mem(place: Place) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    monitor = place.service.directory / "qmp"
    path = place.path("vm", "hotplug")
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    words += ["-machine", "q35", "-m", "size=64M,maxmem=1G", "-qmp", f"unix:{monitor},server=on,wait=off"]
    words += ["-object", f"memory-backend-file,id=more,size={RAM},mem-path={path},share=on"]
    words += ["-device", "virtio-mem-pci,id=vmem,memdev=more,requested-size=0"]
    with subprocess.Popen(["sh", "-c", 'read go; exec "$@"', "sh", *words], stdin=subprocess.PIPE, text=True) as qemu:
        try:
            place.client.apply(do.Reserve("hotplug", RAM, prefault=True))
            place.client.apply(do.GuestAttach("vm", qemu.pid))
            place.client.apply(do.Map("hotplug", "vm"))
            assert qemu.stdin is not None
            qemu.stdin.write("\n")
            qemu.stdin.flush()
            until(lambda: running(monitor), "QEMU's monitor")
            seen = place.shown().regions[0].seen  # it empties what the guest has not asked for yet
            assert seen is not None
            assert seen.resident < RAM
        finally:
            qemu.kill()
