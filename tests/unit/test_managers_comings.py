"""Domains that come and go are told by the kernel, whatever of the daemons' directories is there, and by looking."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.domains import ALICE, host, place, qemu, status
from support.trees import Tree
from support.waiting import until

from memconsole.backend.kernel.inotify import Inotify
from memconsole.backend.managers import comings
from memconsole.backend.managers.comings import Coming, Comings


class Told:
    """What one thread is told, as a control process's does it."""

    def __init__(self, root: Path) -> None:
        self.heard: list[Coming] = []
        self.looks = 0
        self._comings = Comings(root)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        until(lambda: self.looks > 0, "the domains that run are known")

    def _run(self) -> None:
        while self._comings.wait():
            self.heard += self._comings.news()
            self.looks += 1

    def names(self) -> list[tuple[str, bool]]:
        return [(each.managed.name, each.came) for each in self.heard]

    def close(self) -> None:
        self._comings.stop()
        self._thread.join()
        self._comings.close()


@contextlib.contextmanager
def told(root: Path) -> Iterator[Told]:
    made = Told(root)
    try:
        yield made
    finally:
        made.close()


def start(tree: Tree, name: str, pid: int) -> None:
    """As libvirtd writes it: beside, then renamed."""
    qemu(tree, pid, 0)
    tree.write(f"/run/libvirt/qemu/{name}.xml.new", status(pid, name=name))
    directory = tree.root / "run/libvirt/qemu"
    (directory / f"{name}.xml.new").rename(directory / f"{name}.xml")


def test_a_domain_that_starts_and_one_that_ends_are_told(tmp_path: Path) -> None:
    tree = host(tmp_path)
    start(tree, "before", 300)
    with told(tree.root) as heard:
        start(tree, "web", 301)
        until(lambda: heard.names() == [("web", True)], "it has started")
        start(tree, "web", 301)  # its state has changed, and it has not
        (tree.root / "run/libvirt/qemu/before.xml").unlink()
        until(lambda: heard.names()[1:] == [("before", False)], "the other has ended")


def test_directories_are_waited_for_that_are_not_there_yet(tmp_path: Path) -> None:
    tree = host(tmp_path)
    shutil.rmtree(tree.root / "run/user")
    with told(tree.root) as heard:
        start(tree, "web", 301)
        until(lambda: ("web", True) in heard.names(), "the system's first domain")
        qemu(tree, 500, ALICE)
        tree.write(place(ALICE), status(500, name="mine"))
        until(lambda: (f"mine@{ALICE}", True) in heard.names(), "a user's first domain")
        shutil.rmtree(tree.root / "run/libvirt")
        until(lambda: ("web", False) in heard.names(), "its directory is gone")
        start(tree, "again", 302)
        until(lambda: ("again", True) in heard.names(), "the directory came back")


def test_a_file_that_a_dead_daemon_left_is_no_domain(tmp_path: Path) -> None:
    tree = host(tmp_path)
    tree.directory("/run/libvirt/qemu")
    with told(tree.root) as heard:
        tree.write("/run/libvirt/qemu/left.xml", status(77, name="left"))
        start(tree, "web", 301)
        until(lambda: ("web", True) in heard.names(), "the one that runs")
        assert heard.names() == [("web", True)]


def test_of_a_user_who_writes_and_removes_all_the_time_some_is_told(tmp_path: Path) -> None:
    tree = host(tmp_path)
    file = tree.root / place(ALICE).lstrip("/")
    bell = Comings(tree.root)
    try:
        assert list(bell.news()) == []
        heard = 0
        for _ in range(30):
            file.unlink()
            heard += len(list(bell.news()))
            file.write_bytes(status(500))
            heard += len(list(bell.news()))
        assert heard == comings._OF_ONE
    finally:
        bell.close()


def test_where_the_kernel_gives_no_inotify_it_is_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Inotify) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Inotify, "__init__", refused)
    monkeypatch.setattr(comings, "EVERY_S", 0.01)
    tree = host(tmp_path)
    with told(tree.root) as heard:
        start(tree, "web", 301)
        until(lambda: heard.names() == [("web", True)], "it has started")
