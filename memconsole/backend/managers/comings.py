"""Domains that libvirt starts and ends, noticed when it happens: the kernel tells of files in the daemons' directories.

    /run/libvirt/qemu                   of the system's daemon: NAME.xml is put there, replaced, and taken away
    /run/user/UID/libvirt/qemu/run      of users' session daemons, likewise

A directory that is not there yet is waited for in the one above it. Where the kernel gives no inotify (this user has as
many as he may), it is looked once a second instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from memconsole.backend.kernel import census, tree
from memconsole.backend.kernel.inotify import Inotify
from memconsole.backend.kernel.tree import Root
from memconsole.backend.managers import libvirt, sessions
from memconsole.backend.peers.peer import Rate
from memconsole.model import Managed

EVERY_S = 1.0
"""How often it is looked where the kernel does not tell."""
_CALM_S = 0.1
"""What happens in this time is one piece of news: a daemon writes its file several times while a domain starts."""
_OF_ONE, _OF_ALL, _WITHIN_S = 20, 100, 60.0
"""Domains of users that are told within a minute: to write such a file costs nothing."""
_XML = re.compile(r".*\.xml", re.DOTALL)
_SYSTEMS = (
    ("/run", re.compile("libvirt|user")),
    ("/run/libvirt", re.compile("qemu")),
    (libvirt.STATUS, _XML),
    (sessions.USERS, re.compile(r"[0-9]+")),
)
_USERS = tuple(zip(sessions.STEPS, (*map(re.compile, ("libvirt", "qemu", "run")), _XML), strict=True))
"""Directories that are watched, and the names in them that are news."""


class Coming(NamedTuple):
    """A domain that ``came`` or went, and the process that runs it."""

    managed: Managed
    pid: int
    came: bool


class Comings:
    """The domains that run, as one thread asks for them; any thread may :meth:`stop` it."""

    def __init__(self, root: Root = "/") -> None:
        self._root = root
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._rate = Rate(_OF_ONE, _OF_ALL, _WITHIN_S)
        self._known: dict[int, Managed] | None = None
        self._watched: dict[int, re.Pattern[str]] = {}
        self._inotify = _begun()
        self._watch()

    def wait(self) -> bool:
        """Wait until a domain may have come or gone; false once it is to stop."""
        while self._known is not None:
            fds = [self._end] if self._inotify is None else [self._end, self._inotify.fd]
            told = _ready(fds, EVERY_S if self._inotify is None else None)
            if self._end in told or _ready([self._end], _CALM_S if told else 0.0):
                return False
            if self._inotify is None or self._is_news():
                break
        return True

    def news(self) -> Iterator[Coming]:
        """The domains that have come and gone since it was asked last; none the first time."""
        named = self._named()
        now = {pid: managed for pid, managed in named.items() if self._runs(named, pid)}
        before, self._known = self._known, now
        if before is None:
            return
        went = [Coming(before[pid], pid, came=False) for pid in before if not _same(before[pid], now.get(pid))]
        came = [Coming(now[pid], pid, came=True) for pid in now if not _same(now[pid], before.get(pid))]
        for each in (*went, *came):
            if each.managed.user is None or self._rate.take(each.managed.user):
                yield each

    def stop(self) -> None:
        """Have who waits return."""
        os.eventfd_write(self._end, 1)

    def close(self) -> None:
        """Close the queue and the event, once no thread waits."""
        if self._inotify is not None:
            self._inotify.close()
        os.close(self._end)

    def _named(self) -> dict[int, Managed]:
        found: dict[int, Managed] = {}
        for each in (sessions, libvirt):
            with contextlib.suppress(*tree.UNREADABLE):
                found |= each.domains(self._root)
        return found

    def _runs(self, named: Mapping[int, Managed], pid: int) -> bool:
        """Whether the process is the domain's: a daemon that died leaves files behind."""
        with contextlib.suppress(*tree.UNREADABLE):
            return libvirt.of_process(named, pid, census.command(self._root, pid)) is not None
        return False

    def _is_news(self) -> bool:
        """Whether what was told concerns a domain; a directory that came is watched from now on."""
        found = False
        for event in self._inotify.read() if self._inotify is not None else ():
            wanted = self._watched.get(event.watch)
            found = found or event.lost or event.ended or (wanted is not None and bool(wanted.fullmatch(event.name)))
            if event.ended:
                self._watched.pop(event.watch, None)
        if found:
            self._watch()
        return found

    def _watch(self) -> None:
        """Watch what is there of the directories, each before what is in it is looked for."""
        for path, names in _SYSTEMS:
            self._watch_one(tree.below(self._root, path), names)
        users: list[int] = []
        with contextlib.suppress(*tree.UNREADABLE):
            users = sessions.users(self._root)
        for uid in users:
            for below, names in _USERS:
                try:
                    fd = sessions.opened(self._root, uid, below)
                except (OSError, *tree.UNREADABLE):
                    break
                try:
                    self._watch_one(fd, names)
                finally:
                    os.close(fd)

    def _watch_one(self, directory: str | int, names: re.Pattern[str]) -> None:
        with contextlib.suppress(OSError):  # it is not there, or there are too many: a Snapshot has what is missed here
            if self._inotify is not None:
                self._watched[self._inotify.watch(directory)] = names


def _ready(fds: list[int], within: float | None) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if within is None else within * 1000)}


def _same(one: Managed, other: Managed | None) -> bool:
    return other is not None and (one.uuid, one.id, one.user) == (other.uuid, other.id, other.user)


def _begun() -> Inotify | None:
    try:
        return Inotify()
    except OSError:
        return None
