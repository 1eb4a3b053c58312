"""The whole server under ASan and UBSan on a real mount: the kernel's own requests, and its end without a leak."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from support.guests import region
from support.mounts import NOBODY, Attacker, add_guest, hostile, mounts, unmount
from support.waiting import LONG_S, until

from memconsole.backend.exports.fuse import FuseTree, MapPart
from memconsole.errors import Gone, Refused

TREE = Path(__file__).parents[2]
NATIVE = TREE / "memconsole/native"
FLAGS = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]
SIZE = 1 << 20


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("fuse") / "memconsole-fuse-sanitized"
    tool = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]
    core = [TREE / source for source in tool["setuptools"]["ext-modules"][0]["sources"]]
    sources = [*sorted(NATIVE.glob("fuse*.c")), *core]
    subprocess.run(["cc", *FLAGS, "-fsanitize=address,undefined", "-I", NATIVE, "-o", built, *sources], check=True)
    return built


def connect(path: Path) -> FuseTree:
    found: list[FuseTree] = []

    def try_it() -> bool:
        try:
            found.append(FuseTree(path))
        except Gone:
            return False
        return True

    until(try_it, "the server listens")
    return found[0]


def use(tree: FuseTree, fd: int, built: Path) -> None:
    add_guest(tree, "web", NOBODY, NOBODY)
    path = tree.add_ram("web", "ram0", fd, uid=NOBODY, gid=NOBODY)
    status = tree.set_status("web", b"{}" * 9000, NOBODY, NOBODY)
    pfnmap = tree.set_pfnmap("web", [MapPart(fd, 0, SIZE, 0), MapPart(fd, 4096, 8192, None)])
    link = tree.link_window("web", "0000:00:04.0", 0, Path("/sys/none"))
    assert status.read_bytes() == b"{}" * 9000
    assert link.readlink() == Path("/sys/none")
    assert pfnmap.read_bytes().startswith(b"offset")
    assert sorted(each.name for each in path.parents[1].iterdir()) == ["mmio", "pfnmap", "ram", "state", "status"]
    with Attacker(built, path) as guest:
        for order in ("open", "map", "store", "read", "write", "truncate", "allocate", "seal", "xattr", "lock", "fork"):
            guest.do(order)
        assert guest.do("load") == "ok hostile!"
        with pytest.raises(FileNotFoundError):
            (path.parent / "none").stat()
        assert tree.revoke("guests/web/ram/ram0").cut
        assert guest.do("read") == "EIO"
        assert tree.remove("guests/web", recursive=True).cut
    assert tree.list()[0].path == "guests"
    until(lambda: tree.status().handles == 0, "every file is released")


def unmounted(tree: FuseTree) -> bool:
    try:
        unmount(tree)
    except Refused as refused:
        if refused.code != "MountBusy":
            raise
        return False
    return True


def test_a_whole_life_under_sanitizers(program: Path) -> None:
    with mounts() as mount, region(SIZE) as fd:
        command = [str(program), "-f", str(mount.runtime / "fuse"), str(mount.point)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                tree = connect(mount.runtime / "fuse")
                mount.trees.append(tree)
                if tree.status().passthrough:
                    pytest.skip(tree.status().capability().why)
                mount.servers.append((tree.pid, tree.status().connection))
                os.pwrite(fd, b"contents", 0)
                built = hostile(mount.runtime)
                for _ in range(3):
                    use(tree, fd, built)
                until(lambda: unmounted(tree), "files are let go of: a close is answered before its RELEASE is")
                said = server.communicate(timeout=LONG_S)[1]
            finally:
                server.kill()
        assert server.returncode == 0, said
        assert "ERROR" not in said
