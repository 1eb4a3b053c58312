"""Mounts for tests: a server of its own in a short directory, and an end that nothing can hang on.

A process with a file on a mount whose server does not answer cannot be killed; aborting the mount's connection through
fusectl lets it go. So every mount ends with that, whatever a test left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from memconsole.backend.exports import fuse
from memconsole.backend.exports.fuse import FuseTree
from memconsole.backend.kernel.mounts import mounts as mounted
from memconsole.errors import Gone
from memconsole.native import program
from support.guests import Obedient
from support.waiting import LONG_S, until

NOBODY = 65534
STRANGER = 65533
_CONTROL = Path("/sys/fs/fuse/connections")


@dataclass
class Mount:
    """A runtime directory and a mountpoint; ``servers`` are the pids of those that were started."""

    runtime: Path
    point: Path
    servers: list[tuple[int, int]]
    trees: list[FuseTree]

    def start(self) -> FuseTree:
        tree = FuseTree.start(self.runtime, self.point)
        self.trees.append(tree)
        self.servers.append((tree.pid, tree.status().connection))
        return tree

    def kill(self, tree: FuseTree) -> None:
        """End the server as a crash would, and wait until it is gone."""
        os.kill(tree.pid, signal.SIGKILL)
        wait_gone(tree.pid)


def wait_gone(pid: int) -> None:
    """Until no thread of a process is left, which may still hold its files when the first one is a zombie."""
    until(lambda: not _lives(pid), f"the end of process {pid}")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in {"Z", "X"} or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def _fusectl() -> Iterator[Path]:
    """Where connections can be aborted; mounted for the moment if it is nowhere."""
    if any(_CONTROL.iterdir()):
        yield _CONTROL
        return
    directory = Path(tempfile.mkdtemp(prefix="fusectl-"))
    subprocess.run(["mount", "-t", "fusectl", "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)
        directory.rmdir()


def abort(connection: int) -> None:
    """Let everybody go who waits for a connection's server; a connection that ended is no more."""
    with _fusectl() as control:
        file = control / str(connection) / "abort"
        if file.exists():
            file.write_text("1")


def _is_ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("memconsole-fuse")
    except OSError:
        return False


def _end(mount: Mount) -> None:
    for tree in mount.trees:
        tree.close()
    for pid, connection in mount.servers:
        _end_server(pid, connection)
    _unmount(mount.point)
    shutil.rmtree(mount.runtime)


def _end_server(pid: int, connection: int) -> None:
    abort(connection)
    if _is_ours(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_gone(pid)


def mounted_below(directory: Path) -> list[Path]:
    """What is mounted at a directory and below it, the deepest first."""
    return sorted({each.path for each in mounted() if each.path.is_relative_to(directory)}, reverse=True)


def _unmount(point: Path) -> None:
    while found := mounted_below(point):
        subprocess.run(["umount", "-l", found[0]], check=True)


def end_at(runtime: Path, point: Path) -> None:
    """End the server of a runtime directory, if there is one, and whatever is mounted at a directory or below it."""
    with contextlib.suppress(Gone), contextlib.closing(FuseTree(runtime / "fuse")) as tree:
        _end_server(tree.pid, tree.status().connection)
    _unmount(point)


@contextlib.contextmanager
def mounts() -> Iterator[Mount]:
    """A place to mount, or a skip where that cannot be."""
    if os.geteuid():
        pytest.skip("mounting is for root")
    if not Path("/dev/fuse").exists():
        pytest.skip("there is no /dev/fuse")
    program("memconsole-fuse")
    runtime = Path(tempfile.mkdtemp(prefix="mcf-"))
    runtime.chmod(0o755)
    mount = Mount(runtime, runtime / "mnt", [], [])
    mount.point.mkdir()
    try:
        yield mount
    finally:
        _end(mount)


@contextlib.contextmanager
def trees() -> Iterator[FuseTree]:
    """A fresh mount with passthrough, or a skip."""
    with mounts() as mount:
        tree = mount.start()
        if tree.status().passthrough:
            pytest.skip(tree.status().capability().why)
        yield tree


def hostile(directory: Path) -> Path:
    """The hostile process (tests/host/hostile.c), built where every user may run it."""
    source = Path(__file__).parents[1] / "host" / "hostile.c"
    built = directory / "hostile"
    subprocess.run(["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-o", built, source], check=True)
    built.chmod(0o755)
    return built


class Attacker(Obedient):
    """A hostile process of some user, on a file; ``do`` has it try something and says how it went.

    It has the descriptors ``sockets`` too, to give its file away over them.
    """

    def __init__(self, built: Path, path: Path, uid: int = NOBODY, sockets: Sequence[int] = ()) -> None:
        super().__init__([built, str(uid), path], sockets)

    def ends(self) -> int:
        """How it ends, which it is about to."""
        return self.process.wait(LONG_S)


@contextlib.contextmanager
def file_user(path: Path, code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process with ``path`` as its first argument that says ``ready`` and waits for lines."""
    command = [sys.executable, "-c", code, str(path), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def add_guest(tree: FuseTree, guest: str, uid: int = 0, gid: int = 0) -> Path:
    """A guest's directory with its own directories in it, as the mount of a control process has them."""
    tree.directory("guests", mode=0o755)
    top = tree.directory(f"guests/{guest}", uid=uid, gid=gid, mode=0o550)
    for name in ("ram", "state", "mmio"):
        tree.directory(f"guests/{guest}/{name}", uid=uid, gid=gid, mode=0o550)
    return top


def unmount(tree: FuseTree, *, lazy: bool = False) -> None:
    """Have the server unmount and end; with ``lazy`` even while files are open, which then give ENOTCONN."""
    tree._request(fuse._FuseOp.QUIT, flags=int(lazy))
    tree.close()
