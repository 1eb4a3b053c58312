"""The mount through the deaths of those around it: control process, server, and whoever unmounts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.guests import region
from support.mounts import NOBODY, Attacker, Mount, abort, add_guest, hostile, mounts, unmount, wait_gone
from support.waiting import LONG_S, until

from memconsole.backend.exports.fuse import FuseTree
from memconsole.errors import Gone, MemconsoleError, Refused

SIZE = 1 << 20

CONTROL = """
import os, sys, time
from pathlib import Path
from memconsole.backend.exports.fuse import FuseTree
tree = FuseTree.start(Path(sys.argv[1]), Path(sys.argv[2]))
for name in ("guests", "guests/web", "guests/web/ram"):
    tree.directory(name, uid=65534, gid=65534, mode=0o550)
fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, 1 << 20)
os.pwrite(fd, b"contents", 0)
tree.add_ram("web", "ram0", fd, uid=65534, gid=65534)
tree.set_status("web", b"before")
print(tree.pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def mount() -> Iterator[Mount]:
    with mounts() as mount:
        yield mount


@pytest.fixture
def memfd() -> Iterator[int]:
    with region(SIZE) as fd:
        os.pwrite(fd, b"contents", 0)
        yield fd


def fill(tree: FuseTree, fd: int) -> Path:
    if tree.status().passthrough:
        pytest.skip(tree.status().capability().why)
    add_guest(tree, "web", NOBODY, NOBODY)
    return tree.add_ram("web", "ram0", fd, uid=NOBODY, gid=NOBODY)


def opened(tree: FuseTree) -> list[str]:
    return [entry.path for entry in tree.list() if entry.open]


def test_a_killed_control_process_changes_nothing_for_a_guest(mount: Mount) -> None:
    command = [sys.executable, "-c", CONTROL, str(mount.runtime), str(mount.point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as control:
        assert control.stdout is not None
        server = int(control.stdout.readline())
        tree = mount.start()
        assert tree.pid == server, "one server a runtime directory"
        with Attacker(hostile(mount.runtime), mount.point / "guests/web/ram/ram0") as guest:
            assert [guest.do(order) for order in ("open", "map")] == ["ok", "ok"]
            control.send_signal(signal.SIGKILL)
            control.wait()
            assert guest.do("load") == "ok contents"
            assert guest.do("open") == "ok", "nobody is needed to open it again"
            assert guest.do("map") == "ok"
            assert guest.do("store") == "ok hostile!"
            assert (mount.point / "guests/web/status").read_bytes() == b"before"
            new = mount.start()
            assert new.pid == server
            # the kernel tells of the end of what was read when it gets to it
            until(lambda: opened(new) == ["guests/web/ram/ram0"], "only the guest's file is open")
            new.set_status("web", b"after")
            assert (mount.point / "guests/web/status").read_bytes() == b"after"
            assert new.revoke("guests/web/ram/ram0").open == 1
            assert guest.do("open") == "EACCES"


def test_a_killed_server_takes_no_ram_away_and_a_new_one_mounts_anew(mount: Mount, memfd: int) -> None:
    first = mount.start()
    path = fill(first, memfd)
    built = hostile(mount.runtime)
    with Attacker(built, path) as guest:
        assert [guest.do(order) for order in ("open", "map")] == ["ok", "ok"]
        mount.kill(first)
        assert guest.do("load") == "ok contents"
        assert guest.do("store") == "ok hostile!"
        assert guest.do("open") == "ENOTCONN"
        with pytest.raises(Gone):
            first.list()
        with pytest.raises(OSError, match="not connected"):
            path.stat()
        second = mount.start()
        assert second.pid != first.pid
        assert second.list() == [], "its tree is the control process's to give"
        with pytest.raises(Gone) as gone:
            first.list()
        assert gone.value.code == "FuseGone"
        fill(second, memfd)
        assert guest.do("load") == "ok hostile!", "what was mapped before is still there"
        assert guest.do("open") == "ok"
        assert guest.do("map-again") == "ok hostile!"
        with Attacker(built, path) as other:
            assert [other.do(order) for order in ("open", "map", "load")] == ["ok", "ok", "ok hostile!"]
    mounted = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(mount.point) in line]
    assert len(mounted) == 1, "the dead mount is gone"


def test_a_file_held_open_over_a_restart_can_be_let_go(mount: Mount, memfd: int) -> None:
    first = mount.start()
    path = fill(first, memfd)
    with Attacker(hostile(mount.runtime), path) as guest:
        for order in ("open", "map"):
            guest.do(order)
        mount.kill(first)
        fill(mount.start(), memfd)
        assert guest.do("times") == "ENOTCONN"
        assert guest.do("truncate") == "ENOTCONN"
        assert guest.do("close") == "ok"
        assert guest.do("load") == "ok contents"
        assert guest.do("open") == "ok"
        assert guest.do("read") == "ok contents"


def test_a_mount_in_use_is_not_unmounted_unless_told_to(mount: Mount, memfd: int) -> None:
    tree = mount.start()
    path = fill(tree, memfd)
    with Attacker(hostile(mount.runtime), path) as guest:
        guest.do("open")
        guest.do("map")
        guest.do("close")
        for _ in range(2):
            with pytest.raises(Refused) as refused:
                unmount(tree)
            assert refused.value.code == "MountBusy", "a mapping keeps it busy"
        os.kill(tree.pid, signal.SIGTERM)
        assert tree.status().pid == tree.pid, "nor does a signal end it"
        unmount(tree, lazy=True)
        wait_gone(tree.pid)
        assert guest.do("load") == "ok contents"
    assert not list(mount.point.iterdir())


def is_unused(tree: FuseTree) -> bool:
    return tree.status().handles == 0


def test_an_unused_mount_is_unmounted_and_its_server_ends(mount: Mount, memfd: int) -> None:
    for end in ("unmount", "umount", "SIGTERM"):
        tree = mount.start()
        path = fill(tree, memfd)
        assert path.read_bytes()[:8] == b"contents"
        until(partial(is_unused, tree), "it is unused")
        if end == "unmount":
            unmount(tree)
        elif end == "umount":
            subprocess.run(["umount", mount.point], check=True)
        else:
            os.kill(tree.pid, signal.SIGTERM)
        wait_gone(tree.pid)
        assert not list(mount.point.iterdir())
        assert not (mount.runtime / "fuse").exists()


def test_two_servers_do_not_share_a_place(mount: Mount, tmp_path: Path) -> None:
    tree = mount.start()
    with pytest.raises(Refused) as refused:
        FuseTree.start(mount.runtime, tmp_path)
    assert refused.value.code == "OtherMount"
    other = mount.runtime / "other"
    other.mkdir()
    with pytest.raises(MemconsoleError) as taken:
        FuseTree.start(other, mount.point)
    assert taken.value.code == "MountTaken"
    assert "another server" in taken.value.why
    assert tree.status().pid == tree.pid
    with pytest.raises(MemconsoleError, match="nothing can be mounted"):
        FuseTree.start(other, mount.runtime / "nowhere")


def test_an_aborted_connection_ends_the_server(mount: Mount, memfd: int) -> None:
    """What an operator does when a server hangs: fusectl."""
    tree = mount.start()
    path = fill(tree, memfd)
    with Attacker(hostile(mount.runtime), path) as guest:
        for order in ("open", "map"):
            guest.do(order)
        abort(tree.status().connection)
        wait_gone(tree.pid)
        assert guest.do("load") == "ok contents"
        assert guest.do("open") == "ENOTCONN"
    mount.start()


def test_a_stopped_server_hangs_nobody_for_good(mount: Mount, memfd: int) -> None:
    tree = mount.start()
    path = fill(tree, memfd)
    os.kill(tree.pid, signal.SIGSTOP)
    with subprocess.Popen(["stat", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as stuck:
        abort(mount.servers[0][1])
        assert stuck.wait(LONG_S) != 0
    os.kill(tree.pid, signal.SIGKILL)
    wait_gone(tree.pid)


def test_only_root_commands_the_server(mount: Mount) -> None:
    mount.start()
    (mount.runtime / "fuse").chmod(0o777)
    code = f"""
import os, socket
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({str(mount.runtime / "fuse")!r})
print(connection.recv(100)[2], connection.recv(100))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "14 b''\n"
