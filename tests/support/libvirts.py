"""A libvirtd of the test's own: in a mount namespace, with directories of its own; it ends with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from support import lab
from support.waiting import until

ENTER = r"""
set -e
if [ -n "$NEWER" ]; then  # programs and libraries over this machine's; plugins and helpers are of one version
    mount -t overlay overlay -o "lowerdir=$NEWER/usr:/usr" /usr
    for own in lib/libvirt lib/x86_64-linux-gnu/libvirt; do mount --bind "$NEWER/usr/$own" "/usr/$own"; done
fi
mount -t tmpfs none /run/libvirt
for kind in lib log cache; do mount --bind "$1/$kind" /var/$kind/libvirt; done
mount --bind "$1/etc" /etc/libvirt
mkdir /run/libvirt/ram
# Where KVM is there and libvirt's user may not open it, libvirt asks QEMU again and again what it can.
if [ -e /dev/kvm ]; then
    mknod -m 666 "$1/kvm" c 10 232
    mount --bind "$1/kvm" /dev/kvm
fi
directory=$1
shift
for path in "$@"; do mkdir -p "$directory/over$path"; mount --bind "$directory/over$path" "$path"; done
echo ready
exec sleep infinity
"""
REAPER = r"""
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
daemon = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
signal.signal(signal.SIGTERM, lambda *_: daemon.terminate())
while True:
    try:
        ended, _ = os.wait()
    except ChildProcessError:
        break
    if ended == daemon.pid:
        os.write(1, b"ended")
        os.close(1)
"""
"""Starts libvirtd, says when it ended, and takes its QEMUs in: libvirt waits for a minute where nothing reaps them."""
QEMU_CONF = """cgroup_controllers = [ ]
security_driver = "none"
stdio_handler = "file"
memory_backing_dir = "/run/libvirt/ram"
"""


COUNTING = """<domain type='qemu'>
  <name>counting</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>32</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><loader readonly='yes' type='rom'>{firmware}</loader></os>
  <features><acpi/></features>
</domain>
"""
"""A domain with private RAM, whose firmware (:mod:`.firmware`) counts and checks its memory."""


def places() -> list[str]:
    """Where memconsole has or puts files of its own, as far as this host has such directories, for :func:`libvirts`."""
    over = ("/run/memconsole", "/etc/systemd/system", "/etc/apparmor.d/local/abstractions")
    return [path for path in over if Path(path).parent.is_dir()]


def versions() -> list[Path | None]:
    """This machine's libvirt, and a newer one that tools/install_debian.sh has unpacked, for :func:`libvirts`."""
    unpacked = lab.cache() / "libvirt-newest"
    return [None, *([unpacked] if (unpacked / "version").exists() else [])]


def named(newer: Path | None) -> str:
    """What a test with one of them is called."""
    return "installed" if newer is None else "newest"


class Libvirt:
    """What runs in the namespace: libvirtd, its QEMUs, and the commands of a test."""

    def __init__(self, directory: Path, namespace: int, newer: Path | None = None) -> None:
        self.directory = directory
        self.newer = newer
        self._inside = ("nsenter", "-t", str(namespace), "-m", "--")
        self.daemon: subprocess.Popen[bytes] | None = None
        self._reapers: list[subprocess.Popen[bytes]] = []

    def ended(self, *command: str | Path, fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
        """A command that has ended, however it did; it was handed these descriptors."""
        return subprocess.run(
            self.inside(*command),
            check=False,
            text=True,
            capture_output=True,
            timeout=180,
            env=_environment(),
            pass_fds=tuple(fds),
        )

    def inside(self, *command: str | Path) -> list[str | Path]:
        """A command as it runs where libvirt's own files are."""
        return [*self._inside, *command]

    def run(self, *command: str | Path, fds: Sequence[int] = ()) -> str:
        """What a command says that ends well."""
        made = self.ended(*command, fds=fds)
        assert made.returncode == 0, f"{command}: {made.stdout}{made.stderr}"
        return made.stdout

    def virsh(self, *words: str | Path) -> str:
        """What virsh says."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *words)

    def begin(self) -> None:
        """Start a libvirtd, and wait until it answers."""
        with (self.directory / "libvirtd.log").open("wb") as log:
            words = [sys.executable, "-c", REAPER, "libvirtd", "-p", "/run/libvirt/daemon.pid"]
            self.daemon = subprocess.Popen([*self._inside, *words], stdout=subprocess.PIPE, stderr=log)

        def answers() -> bool:
            asked = [*self._inside, "virsh", "-q", "-c", "qemu:///system", "list"]
            return subprocess.run(asked, check=False, capture_output=True, timeout=180).returncode == 0

        until(answers, "libvirtd answers", 180.0)

    def end(self) -> None:
        """End libvirtd; its domains run on."""
        daemon, self.daemon = self.daemon, None
        if daemon is not None and daemon.stdout is not None:
            daemon.terminate()
            with daemon.stdout:
                assert daemon.stdout.read() == b"ended"
            self._reapers.append(daemon)

    def close(self) -> None:
        """End libvirtd, and what it started: after a test that failed it may not have been there to do it."""
        self.end()
        for reaper in self._reapers:
            for left in psutil.Process(reaper.pid).children():
                left.kill()
            reaper.wait()


def _unless_used(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


@contextlib.contextmanager
def libvirts(over: Sequence[str] = (), newer: Path | None = None) -> Iterator[Libvirt]:
    """A libvirtd without domains, networks or storage; ``over``: directories of the host that it has empty ones for.

    ``newer``: a libvirt that lies over this machine's.

    It skips where there is no libvirtd, or no right to a mount namespace.
    """
    if os.geteuid():
        pytest.skip("libvirtd in a mount namespace of its own needs root")
    if shutil.which("libvirtd") is None or shutil.which("virsh") is None:
        pytest.skip("there is no libvirtd (libvirt-daemon-system, libvirt-clients)")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lv-", ignore_cleanup_errors=True)))
        directory.chmod(0o755)
        for name in ("lib", "log", "cache", "etc"):
            (directory / name).mkdir()
        (directory / "etc/qemu.conf").write_text(QEMU_CONF)
        (directory / "etc/libvirtd.conf").write_text('auth_unix_rw = "none"\n')
        Path("/run/libvirt").mkdir(exist_ok=True)
        for path in map(Path, over):
            if not path.is_dir():  # a mount point must be
                path.mkdir()
                stack.callback(_unless_used, path)
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", ENTER, "sh", str(directory), *over]
        env = os.environ | {"NEWER": str(newer or "")}
        namespace = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, env=env))
        stack.callback(namespace.kill)
        assert namespace.stdout is not None
        assert namespace.stdout.readline() == b"ready\n"
        made = Libvirt(directory, namespace.pid, newer)
        stack.callback(made.close)
        made.begin()
        yield made
        for name in made.virsh("list", "--name").split("\n"):
            if name:
                made.virsh("destroy", name)
