"""What a file leads to is told by what it is: a node that was made elsewhere leads where the first one does."""

from __future__ import annotations

import os
import signal
import stat
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.mounted import places
from support.waiting import LONG_S

from memconsole.backend.kernel import census, devfiles, tree
from memconsole.backend.kernel.devfiles import Files, Lead, Way
from memconsole.model import Window

NULL = os.makedev(1, 3)
GPU = "0000:41:00.0"
BAR = Window(id=f"{GPU}:0", bdf=GPU, bar=0, start=0, size=4096, io=False, prefetchable=False, wide=False)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of a device that stands for one that leads to windows, and is called like a file of music."""
    node = tmp_path / "music"
    os.mknod(node, 0o600 | stat.S_IFCHR, NULL)
    link_name = tree.link_name
    said = {"/sys/dev/char/1:3": "uio7", "/sys/dev/char/1:3/subsystem": "uio"}
    monkeypatch.setattr(tree, "link_name", lambda root, path: said.get(path) or link_name(root, path))
    try:
        node.open("rb").close()
    except PermissionError:
        pytest.skip(f"no device can be opened below {tmp_path} (nodev)")
    return node


def opened(path: Path | str) -> list[Lead]:
    """What this process's files lead to while one is open."""
    fd = os.open(path, os.O_RDONLY)
    try:
        seen = census.take()
        own = seen.processes[os.getpid()]
        fds = {number: link for number, link in own.fds.items() if number == fd}
        one = replace(own, fds=fds)
        return list(Files("/", [BAR]).opened(one))
    finally:
        os.close(fd)


def test_a_copied_node_leads_where_the_first_one_does(device: Path) -> None:
    assert opened(device) == [Lead(Way.UIO, "uio7")]
    assert opened("/dev/null") == [Lead(Way.UIO, "uio7")]
    assert opened("/dev/zero") == []


def test_a_file_that_is_called_like_one_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "pci0000:40" / GPU / "resource0"
    path.parent.mkdir(parents=True)
    path.touch()
    assert devfiles.named(str(path)) == Lead(Way.BAR, f"{GPU}:0")
    assert opened(path) == []


def test_a_file_whose_server_does_not_answer_is_not_waited_for() -> None:
    with places() as place:
        path = place.grant(place.user())
        fd = os.open(path, os.O_RDWR)
        place.at_end(lambda: os.close(fd))
        looks = threading.Thread(target=lambda: devfiles._status(f"/proc/self/fd/{fd}"))
        server = place.server()
        os.kill(server, signal.SIGSTOP)
        try:
            looks.start()
            looks.join(LONG_S)
            assert not looks.is_alive()
        finally:
            os.kill(server, signal.SIGCONT)
        looks.join()
