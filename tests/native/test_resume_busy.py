"""memconsole-resume and a LUO device that another process has open."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.resume_program import FLAGS, SOURCES
from support.waiting import LONG_S


class BusyDevice:
    """A terminal in the place of /dev/liveupdate: open in this process, which alone may have it (EBUSY for others)."""

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        self.path = os.ttyname(self._slave)
        fcntl.ioctl(self._slave, termios.TIOCEXCL)

    def let_go(self) -> None:
        """Others may open it from now on."""
        fcntl.ioctl(self._slave, termios.TIOCNXCL)

    def close(self) -> None:
        os.close(self._slave)
        os.close(self._master)


@contextlib.contextmanager
def resumed_with(device: BusyDevice, directory: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """memconsole-resume, without a keeper to be found and with a device that is no LUO's."""
    compiler = shutil.which("cc")
    if compiler is None or (os.geteuid() == 0 and shutil.which("setpriv") is None):
        pytest.skip("no C compiler, or no setpriv")
    program = directory / "memconsole-resume"
    named = f'-DLUO_DEVICE="{device.path}"'
    subprocess.run([compiler, *FLAGS, "-fno-sanitize-recover=all", named, *flags, "-o", program, *SOURCES], check=True)
    # who may administer the system opens a terminal that is another's alone
    less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"] if os.geteuid() == 0 else []
    command = [*less, str(program), "--runtime", str(directory / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def test_a_device_that_stays_busy_is_waited_for_and_who_has_it_is_named(tmp_path: Path) -> None:
    with contextlib.closing(BusyDevice()) as device:
        with resumed_with(device, tmp_path, "-DPATIENCE_NS=1000000000ull") as process:
            _, err = process.communicate(timeout=LONG_S)
        assert process.returncode == 7, err
        comm = Path("/proc/self/comm").read_text().strip()
        assert f"{device.path} is busy: process {os.getpid()} ({comm}) has it open; waiting\n" in err
        assert err.count("is busy") == 1
        assert "session memconsole:manifest: Device or resource busy\n" in err


def test_a_device_that_is_let_go_of_is_gone_on_with(tmp_path: Path) -> None:
    with contextlib.closing(BusyDevice()) as device, resumed_with(device, tmp_path) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while not (lines and "is busy" in lines[-1]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert process.poll() is None
        device.let_go()
        _, err = process.communicate(timeout=LONG_S)
        assert process.returncode == 1, err
        assert "session memconsole:manifest: Inappropriate ioctl for device\n" in err
