"""A fleet of lab hosts: each a VM of its own with an sshd on a loopback port, a disk, and two kernels in its /boot.

They are begun side by side and run until the test ends. Nobody tells them what to do but over ssh; what one does to
them is what happens to hosts: the link of a network card is taken down (``cut``), files of /boot are others, the
first kernel is booted again by the machine when a kernel panics.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from memconsole.backend.guests.qmp import Qmp
from support import lab, lab_kernel, lab_python, lab_watch
from support.remotes import free_port
from support.waiting import until

BEGINS = f". {lab.ROOT}/tests/support/lab_fleet.sh"
DEBIAN = f". {lab.ROOT}/tests/support/lab_debian.sh"
"""What a host begins with: this project's service, or systemd and what is installed on its disk."""
PATIENCE = 1500.0
"""Seconds for what will happen, on a machine that emulates several hosts and has other work."""
QMP_S = 30.0
DISK = 512 << 20
_SSHD = """\
HostKey /run/lab/host_key
PidFile none
AuthorizedKeysFile /run/lab/key.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
KexAlgorithms curve25519-sha256
SetEnv "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""


@dataclass
class LabHost:
    """One host: its name, its sshd's port on this machine, and the directory that it shares, in which ``boot`` is."""

    name: str
    port: int
    share: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def boot(self) -> Path:
        """Its /boot."""
        return self.share / "boot"

    def console(self) -> str:
        """What its kernels said."""
        return (self.share / "console").read_text(errors="replace")

    def releases(self) -> list[str]:
        """The kernels that have had a userland here, in order."""
        boots = self.share / "boots"
        return boots.read_text().splitlines() if boots.exists() else []

    def boots(self) -> int:
        """How many there were."""
        return len(self.releases())

    def serves(self) -> bool:
        """Whether the service is up in the kernel that runs."""
        assert self.process is not None
        assert self.process.poll() is None, f"QEMU of {self.name} has ended: {self.console()[-2000:]}"
        return (self.share / "serves").exists()

    def deaf(self) -> bool:
        """Whether nothing runs in it any more, which is the emulation's fault (lab_watch.py)."""
        alive = self.share / "alive"
        return alive.exists() and time.time() - alive.stat().st_mtime > lab_watch.ASLEEP_S

    @contextlib.contextmanager
    def cut_in_the_jump(self) -> Iterator[None]:
        """Pull the cable when the next kernel has a userland, and plug it again when its service is up."""
        boots, ended = self.boots(), threading.Event()

        def cut() -> None:
            with contextlib.closing(Qmp(self.name, self.share / "qmp")) as qmp:
                for up, comes in ((False, lambda: self.boots() > boots), (True, self.serves)):
                    until(lambda comes=comes: comes() or ended.is_set(), self.name, PATIENCE)  # type: ignore[misc]
                    qmp.execute("set_link", {"name": "net", "up": up}, within=QMP_S)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def cpu_seconds(self) -> float:
        """Seconds of processor time that its QEMU has taken so far."""
        assert self.process is not None
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


@dataclass(frozen=True)
class LabFleet:
    """Lab hosts by name; the releases that they run and have to boot next; what ssh reaches them by."""

    hosts: Mapping[str, LabHost]
    old: str
    new: str
    ssh_config: Path

    def run(self, host: str, command: str) -> str:
        """What a shell command on a host writes, which must not fail."""
        words = ["ssh", "-F", str(self.ssh_config), host, command]
        done = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def variables(self) -> dict[str, dict[str, object]]:
        """What Ansible's inventory says of each host."""
        # An emulated host of a busy machine is silent for longer than one that is gone.
        patience = "-o ServerAliveInterval=20 -o ServerAliveCountMax=15"
        return {name: {"ansible_ssh_common_args": f"-F {self.ssh_config} {patience}"} for name in self.hosts}


@contextlib.contextmanager
def lab_fleet(
    directory: Path,
    names: Sequence[str],
    *,
    memory: str = "1G",
    more: str = "",
    begins: str = BEGINS,
    options: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[LabFleet]:
    """Hosts that serve, each on the lab's kernel and with the next one beside it; they end with this.

    ``begins`` is what each boot begins with; ``more`` are lines of shell before the service of one that begins with
    this project's; ``options`` are QEMU's for a host.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for key in ("host_key", "key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(directory / key)]
        subprocess.run(words, check=True)
    image = lab_kernel.image(lab.the_kernel(), lab.cache()).read_bytes()
    old = lab_kernel.release_of(image)
    new = old.replace(old.split("-")[0], _next(old.split("-")[0]), 1)
    images = {old: image, new: lab_kernel.renamed(image, new)}
    hosts = {name: LabHost(name, free_port(), directory / name) for name in names}
    fleet = LabFleet(hosts, old, new, directory / "ssh_config")
    fleet.ssh_config.write_text("".join(_ssh_config(directory, host) for host in hosts.values()))
    with ExitStack() as stack:
        for host in hosts.values():
            _fill(directory, host, images)
            command = _command(host, memory, f"export LAB_MORE='{more}'; {begins}", (options or {}).get(host.name, ()))
            host.process = stack.enter_context(lab.started(command, host.share / "console"))
        for host in hosts.values():
            until(host.serves, f"{host.name} serves: {host.share}", PATIENCE)
        yield fleet


def _next(version: str) -> str:
    """A version one later than this, of as many characters."""
    head, _, last = version.rpartition(".")
    return f"{head}.{(int(last) + 1) % 10}"


def _fill(directory: Path, host: LabHost, images: Mapping[str, bytes]) -> None:
    host.boot.mkdir(parents=True)
    for release, image in images.items():
        (host.boot / f"vmlinuz-{release}").write_bytes(image)
        (host.boot / f"initrd.img-{release}").write_bytes(lab.initrd())
    for name in ("host_key", "key.pub"):
        shutil.copy(directory / name, host.share / name)
    (host.share / "sshd_config").write_text(_SSHD)
    disk = host.share / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK)
    subprocess.run([str(lab_python.MKE2FS), "-q", "-t", "ext4", str(disk)], check=True)


def _command(host: LabHost, memory: str, begins: str, options: Sequence[str]) -> list[str]:
    early = f"export LAB_NAME={host.name}; {begins}"
    forward = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{host.port}-10.0.2.15:22"
    command = lab.prepare(
        "shell",
        host.share,
        memory=memory,
        append="disk=vda",
        devices=("virtio-net-pci,netdev=net",),
        options=(
            *("-netdev", forward, "-qmp", f"unix:{host.share / 'qmp'},server=on,wait=off"),
            *("-drive", f"file={host.share / 'disk'},if=virtio,format=raw,cache=unsafe"),
            *options,
        ),
        early=early,
    )
    return [word for word in command if word != "-no-reboot"]  # a kernel that panics is followed by the first one


def _ssh_config(directory: Path, host: LabHost) -> str:
    key = (directory / "host_key.pub").read_text().split()
    with (directory / "known_hosts").open("a") as file:
        file.write(f"[127.0.0.1]:{host.port} {key[0]} {key[1]}\n")
    return f"""\
Host {host.name}
  HostName 127.0.0.1
  Port {host.port}
  User root
  IdentityFile {directory}/key
  IdentitiesOnly yes
  UserKnownHostsFile {directory}/known_hosts
  GlobalKnownHostsFile none
  ConnectTimeout 120
"""
