"""A libvirtd of the test's own: in a mount namespace, with directories of its own; it ends with the test."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import until

ENTER = r"""
set -e
mount -t tmpfs none /run/libvirt
for kind in lib log cache; do mount --bind "$1/$kind" /var/$kind/libvirt; done
mount --bind "$1/etc" /etc/libvirt
mkdir /run/libvirt/ram
echo ready
exec sleep infinity
"""
QEMU_CONF = """cgroup_controllers = [ ]
security_driver = "none"
stdio_handler = "file"
memory_backing_dir = "/run/libvirt/ram"
"""


class Libvirt:
    """What runs in the namespace: libvirtd, its QEMUs, and the commands of a test."""

    def __init__(self, directory: Path, namespace: int) -> None:
        self.directory = directory
        self._inside = ("nsenter", "-t", str(namespace), "-m", "--")

    def run(self, *command: str | Path) -> str:
        """What a command says that ends well."""
        made = subprocess.run(
            [*self._inside, *command], check=False, text=True, capture_output=True, timeout=180, env=_environment()
        )
        assert made.returncode == 0, f"{command}: {made.stdout}{made.stderr}"
        return made.stdout

    def virsh(self, *words: str | Path) -> str:
        """What virsh says."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *words)

    def begin(self) -> subprocess.Popen[bytes]:
        """A libvirtd that answers."""
        with (self.directory / "libvirtd.log").open("wb") as log:
            daemon = subprocess.Popen(
                [*self._inside, "libvirtd", "-p", "/run/libvirt/daemon.pid"], stdout=log, stderr=log
            )

        def answers() -> bool:
            asked = [*self._inside, "virsh", "-q", "-c", "qemu:///system", "list"]
            return subprocess.run(asked, check=False, capture_output=True, timeout=180).returncode == 0

        until(answers, "libvirtd answers", 180.0)
        return daemon


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


@contextlib.contextmanager
def libvirts() -> Iterator[Libvirt]:
    """A libvirtd without domains, networks or storage.

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
        command = ["unshare", "-m", "--propagation", "private", "sh", "-c", ENTER, "sh", str(directory)]
        namespace = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(namespace.kill)
        assert namespace.stdout is not None
        assert namespace.stdout.readline() == b"ready\n"
        made = Libvirt(directory, namespace.pid)
        daemon = made.begin()
        stack.callback(daemon.wait)
        stack.callback(daemon.terminate)
        yield made
        for name in made.virsh("list", "--name").split("\n"):
            if name:
                made.virsh("destroy", name)
