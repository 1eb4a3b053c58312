"""Other hosts for tests: a program in the place of ssh, and an sshd of a test's own on a loopback port."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.waiting import until

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or ""

_AS_SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do if [ "$1" = -o ]; then shift; fi; shift; done
host=$1
shift
"""


def memconsole_in(directory: Path) -> Path:
    """A directory for PATH in which ``memconsole`` is the one under test."""
    found = directory / "bin"
    found.mkdir()
    program = found / "memconsole"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m memconsole "$@"\n')
    program.chmod(0o755)
    return found


def as_ssh(directory: Path, body: str = 'exec sh -c "$*"') -> Path:
    """A program that is called as ssh is: ``$host`` is the host, ``$*`` the command, which it runs here."""
    program = directory / "as-ssh"
    program.write_text(_AS_SSH + body + "\n")
    program.chmod(0o755)
    return program


@dataclass(frozen=True)
class SshHost:
    """An sshd that lets this user in by a key of its own; ``ssh`` is the program that reaches it, with its words."""

    port: int
    directory: Path
    ssh: str
    name: str = "mc-test"

    @property
    def known_hosts(self) -> Path:
        """The file with the host's key."""
        return self.directory / "known_hosts"


_SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
PidFile {directory}/pid
AuthorizedKeysFile {directory}/key.pub
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM {pam}
PrintMotd no
SetEnv "PATH={path}"
"""
_SSH_CONFIG = """\
Host {name}
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {directory}/key
  IdentitiesOnly yes
  UserKnownHostsFile {directory}/known_hosts
  GlobalKnownHostsFile none
  ConnectTimeout 20
"""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def ssh_host(directory: Path, path: str) -> Iterator[SshHost]:
    """An sshd with keys and configuration in ``directory``; commands there find ``path`` as their PATH."""
    for key in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(directory / key)]
        subprocess.run(command, check=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it is compiled to drop its rights
    host = SshHost(free_port(), directory, f"ssh -F {directory}/ssh_config")
    values: Mapping[str, object] = {
        "port": host.port, "directory": directory, "path": path, "name": host.name, "user": getpass.getuser(),
        "pam": "yes" if os.geteuid() == 0 else "no",
    }  # fmt: skip
    (directory / "sshd_config").write_text(_SSHD_CONFIG.format_map(values))
    (directory / "ssh_config").write_text(_SSH_CONFIG.format_map(values))
    public = (directory / "host_key.pub").read_text().split()
    host.known_hosts.write_text(f"[127.0.0.1]:{host.port} {public[0]} {public[1]}\n")
    command = [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")]
    with (directory / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            until(lambda: _answers(host.port) or process.poll() is not None, "sshd answers")
            assert process.poll() is None, (directory / "log").read_text()
            yield host
        finally:
            process.terminate()
