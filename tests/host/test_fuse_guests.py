"""Stock programs with their memory on the mount: QEMU, LMDB, SQLite."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guests import frames, own_frames, region
from support.mounts import NOBODY, Mount, add_guest, mounts
from support.waiting import LONG_S, until

from memconsole.backend.exports.fuse import FuseTree

RAM = 32 << 20
DATABASE = 16 << 20


@pytest.fixture
def mount() -> Iterator[Mount]:
    with mounts() as mount:
        yield mount


def show(tree: FuseTree, fd: int, uid: int = 0) -> Path:
    if tree.status().passthrough:
        pytest.skip(tree.status().capability().why)
    add_guest(tree, "web", uid, uid)
    return tree.add_ram("web", "ram0", fd, uid=uid, gid=uid)


class Qemu:
    """A QEMU whose RAM is a path; its monitor is a socket."""

    def __init__(self, path: Path, directory: Path) -> None:
        self._socket_path = directory / "qmp"
        self._inode = path.stat().st_ino
        backend = f"memory-backend-file,id=ram,size={RAM},mem-path={path},share=on,align=2M"
        command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        command += ["-machine", "q35,memory-backend=ram", "-m", f"size={RAM}B", "-object", backend]
        self.process = subprocess.Popen([*command, "-qmp", f"unix:{self._socket_path},server=on,wait=off"])
        until(lambda: self.process.poll() is not None or self.goes_on(), "QEMU's monitor")
        self.pid = self.process.pid

    def execute(self, *commands: str) -> list[dict[str, Any]]:
        """Each command's reply; a connection for all of them."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(LONG_S)
            monitor.connect(str(self._socket_path))
            with monitor.makefile("rw") as lines:
                lines.readline()
                replies = []
                for command in ("qmp_capabilities", *commands):
                    lines.write(json.dumps({"execute": command}) + "\n")
                    lines.flush()
                    while "event" in (reply := json.loads(lines.readline())):
                        pass
                    replies.append(reply)
        return replies[1:]

    def running(self) -> bool:
        return self.process.poll() is None and bool(self.execute("query-status")[0]["return"]["running"])

    def goes_on(self) -> bool:
        """As ``running``, of a QEMU that may not listen yet, or end while it is asked."""
        try:
            return self.running()
        except (OSError, json.JSONDecodeError):
            return False

    def ram_at(self) -> int:
        """Where it has the file mapped: by its inode, which no other file has, even after its mount is gone."""
        lines = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return min(int(line.split("-")[0], 16) for line in lines if int(line.split()[4]) == self._inode)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def ram() -> Iterator[int]:
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    with region(RAM) as fd:
        yield fd


def touched(qemu: Qemu, fd: int) -> int:
    """How many pages QEMU has touched, each in the very frame of the memfd."""
    qemu.execute("stop")
    theirs, ours = frames(qemu.pid, qemu.ram_at(), RAM // 4096), own_frames(fd, RAM)
    qemu.execute("cont")
    assert all(pfn in {0, our} for pfn, our in zip(theirs, ours, strict=True))
    return sum(pfn != 0 for pfn in theirs)


def test_qemu_runs_on_a_path_through_the_deaths_of_all_who_made_it(mount: Mount, ram: int) -> None:
    tree = mount.start()
    path = show(tree, ram)
    qemu = Qemu(path, mount.runtime)
    try:
        until(lambda: touched(qemu, ram) > 0, "the firmware's first touch")
        tree.close()
        assert qemu.running(), "the control side is away"
        tree = mount.start()
        mount.kill(tree)
        assert qemu.running(), "the server is dead"
        qemu.execute("system_reset")
        assert touched(qemu, ram) > 0
        tree = mount.start()
        assert show(tree, ram) == path
        assert qemu.running()
        qemu.execute("system_reset")
        assert touched(qemu, ram) > 0
        os.ftruncate(ram, 0)
        until(lambda: not qemu.goes_on(), "it cannot go on without its RAM")
    finally:
        qemu.end()


LMDB = """
import os, sys, lmdb
directory, size, step = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
env = lmdb.open(directory, map_size=size, writemap=step.endswith("w"), max_dbs=2)
if step.startswith("load"):
    for batch in range(50):
        with env.begin(write=True) as txn:
            for row in range(100):
                txn.put(b"%d-%d" % (batch, row), b"v" * 200)
    txn = env.begin(write=True)
    txn.put(b"undone", b"x")
    txn.abort()
    env.sync(True)
with env.begin() as txn:
    assert txn.get(b"undone") is None
    print(sum(1 for _ in txn.cursor()), txn.get(b"49-99") == b"v" * 200, flush=True)
sys.stdin.read()
"""

SQLITE = """
import os, sqlite3, sys
path, size, step = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.setgroups([]); os.setgid(65534); os.setuid(65534)
db = sqlite3.connect(path, isolation_level=None)
for pragma in ("journal_mode=MEMORY", "cache_spill=OFF", f"mmap_size={size}"):
    db.execute(f"PRAGMA {pragma}").fetchall()
if step == "load":
    db.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")
    for batch in range(20):
        db.execute("BEGIN")
        db.executemany("INSERT INTO t (v) VALUES (?)", [("x" * 200,)] * 250)
        db.execute("COMMIT")
    db.execute("BEGIN")
    db.execute("UPDATE t SET v = 'undone'")
    db.execute("DELETE FROM t WHERE k > 10")
    db.execute("ROLLBACK")
    db.execute("DELETE FROM t WHERE k % 2")
assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
assert db.execute("SELECT count(*) FROM t WHERE v = 'undone'").fetchone() == (0,)
print(db.execute("SELECT count(*) FROM t").fetchone()[0], flush=True)
sys.stdin.read()
"""


def user(code: str, place: Path, step: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(place), str(DATABASE), step]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    process.communicate()
    return line


def copy(source: Path, target: Path) -> None:
    """A fresh, small database into the RAM file; the file keeps its size."""
    with target.open("r+b") as file:
        file.write(source.read_bytes())


@pytest.fixture
def home(mount: Mount) -> Path:
    """A database's own directory, where its lock lies."""
    directory = mount.runtime / "db"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    return directory


@pytest.mark.parametrize("how", ["", "w"], ids=["pwrite", "writemap"])
def test_lmdb_runs_its_workload_on_the_mount(mount: Mount, home: Path, tmp_path: Path, how: str) -> None:
    lmdb = pytest.importorskip("lmdb")
    with region(DATABASE) as fd:
        tree = mount.start()
        path = show(tree, fd, NOBODY)
        lmdb.open(str(tmp_path), map_size=DATABASE).close()
        copy(tmp_path / "data.mdb", path)
        (home / "data.mdb").symlink_to(path)
        loader = user(LMDB, home, f"load{how}")
        assert loader.stdout is not None
        assert loader.stdout.readline() == "5000 True\n"
        maps = Path(f"/proc/{loader.pid}/maps").read_text()
        assert str(path) in maps, "it maps the file"
        mount.kill(tree)
        loader.communicate()
        assert loader.returncode == 0
        tree = mount.start()
        show(tree, fd, NOBODY)
        assert said(user(LMDB, home, f"look{how}")) == "5000 True"
        assert path.stat().st_size == DATABASE
        assert b"49-99" in os.pread(fd, DATABASE, 0), "the contents are the region's"


def test_sqlite_runs_its_workload_on_the_mount(mount: Mount, tmp_path: Path) -> None:
    import sqlite3

    with region(DATABASE) as fd:
        tree = mount.start()
        path = show(tree, fd, NOBODY)
        fresh = sqlite3.connect(tmp_path / "fresh")
        fresh.execute("CREATE TABLE made (x)")
        fresh.execute("DROP TABLE made")
        fresh.commit()
        fresh.close()
        copy(tmp_path / "fresh", path)
        loader = user(SQLITE, path, "load")
        assert loader.stdout is not None
        assert loader.stdout.readline() == "2500\n"
        assert str(path) in Path(f"/proc/{loader.pid}/maps").read_text(), "it maps the file"
        mount.kill(tree)
        loader.communicate()
        assert loader.returncode == 0
        tree = mount.start()
        show(tree, fd, NOBODY)
        assert said(user(SQLITE, path, "look")) == "2500"
        two = [user(SQLITE, path, "look") for _ in range(2)]
        assert [said(process) for process in two] == ["2500", "2500"]
        assert path.stat().st_size == DATABASE
        assert os.pread(fd, 15, 0) == b"SQLite format 3"


def test_a_database_that_loses_its_region_ends(mount: Mount, tmp_path: Path) -> None:
    with region(DATABASE) as fd:
        tree = mount.start()
        path = show(tree, fd, NOBODY)
        code = "import mmap,sys;f=open(sys.argv[1],'r+b');m=mmap.mmap(f.fileno(),0);print(m[0],flush=True);input();m[0]"
        with subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "0\n"
            tree.revoke("guests/web/ram/ram0")
            os.ftruncate(fd, 0)
            process.communicate("\n")
            assert process.returncode == -signal.SIGBUS
