"""One pass over all processes: what each is, which files it holds, what it maps.

    /proc/PID/stat      PID "(" COMM ")" STATE PPID ... threads (20) ... start (22) ... rss (24)
    /proc/PID/status    Uid: REAL EFFECTIVE SAVED FS; HugetlbPages: N kB
    /proc/PID/fd/N      a link: /memfd:NAME (deleted), anon_inode:kvm-vm, /dev/vfio/12 ...
    /proc/PID/maps      kept as the kernel wrote it; procmaps parses the lines that are asked for
    /proc/PID/task/TID/{stat,fd,maps}   the same of one thread

A process is all of its threads. One whose first thread has left (``pthread_exit`` in main) is a zombie by its own stat,
with neither maps nor files, and goes on: it is read by one of its threads that live.

Everything about guests, memfds and who maps what is joined from one Census, so that no process is read twice and the
parts of a Snapshot are of one moment.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from typing import NamedTuple

import msgspec

from memconsole.backend.kernel import host, patient, procmaps, tree
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, Gone, KernelRefused, MemconsoleError, Silent, with_rights
from memconsole.model import ProcessId, Unread

_PF_KTHREAD = 0x00200000
_FIRST = 1
"""The process that every PID namespace has: where it is not listed, not only it is left out."""


class Process(msgspec.Struct, frozen=True):
    """A process: ``rss`` in bytes, ``start_ticks`` since boot (tells a reused PID), its fd links and raw maps.

    ``task`` is the thread by which it is read: its first one (``pid``) unless that has left; ``state`` is its.
    """

    pid: int
    comm: str
    state: str
    threads: int
    start_ticks: int
    rss: int
    kernel: bool
    fds: dict[int, str]
    maps: bytes
    task: int
    parent: int

    @property
    def id(self) -> ProcessId:
        """Which process it is."""
        return ProcessId(self.pid, self.start_ticks)

    @property
    def place(self) -> str:
        """Where its files are in /proc."""
        return tree.of_process(self.pid, self.task)

    def holds(self, link: str) -> list[int]:
        """The fds whose link begins with ``link``."""
        return [fd for fd, target in self.fds.items() if target.startswith(link)]


class Census(msgspec.Struct, frozen=True):
    """All processes of one moment; ``hidden`` are those whose files or maps (or all of them) are not shown.

    ``silent`` are those of them whose memory map is locked, others this user may not see. ``unlisted``: there are more,
    which /proc does not even list (``hidepid``).
    """

    root: Root
    processes: dict[int, Process]
    hidden: tuple[int, ...]
    unlisted: bool = False
    silent: tuple[Silent, ...] = ()

    @property
    def unseen(self) -> str:
        """Who is not shown, in words; empty where all is."""
        if self.unlisted:
            return "/proc does not list the processes of other users (hidepid)"
        return f"{len(self.hidden)} processes are not shown to this user" if self.hidden else ""

    def gaps(self) -> tuple[Unread, ...]:
        """What this census could not see."""
        found = []
        if self.unlisted:
            remedy = "run as root (CAP_SYS_PTRACE), or in the group that gid= of the mount of /proc names"
            found.append(Unread("/proc", self.unseen, with_rights(remedy)))
        found += [tree.gap(silent.what, silent) for silent in self.silent]
        if len(self.hidden) > len(self.silent):
            total = len({pid for pid, each in self.processes.items() if not each.kernel} | {*self.hidden})
            why = f"{len(self.hidden) - len(self.silent)} of {total} processes do not show their files or their maps"
            remedy = "run as root (CAP_SYS_PTRACE); what is hidden from root too, a security policy hides"
            found.append(Unread("/proc/PID/{fd,maps}", why, with_rights(remedy)))
        return tuple(found)

    def mappings(self, objects: Collection[tuple[int, int]]) -> Iterator[tuple[int, Vma]]:
        """Who maps files, given as (st_dev, st_ino): each PID with each of its mappings of one, whatever it is called.

        Raises:
            BadFile: a process's maps are not as the kernel writes them.
        """
        needles = [procmaps.device_word(device) for device in sorted({device for device, _ in objects})]
        for process in self.processes.values():
            if any(needle in process.maps for needle in needles):
                for vma in procmaps.parse(process.maps, *needles):
                    if (vma.device, vma.inode) in objects:
                        yield process.pid, vma


def take(root: Root = "/", *, closed: Collection[int] = (), among: Collection[int] | None = None) -> Census:
    """Read every process once, or those ``among`` these PIDs; one that ends meanwhile is not in the census.

    The files and maps of ``closed`` processes are left out: those of who holds thousands of fds on our behalf.

    Raises:
        NotFound, Denied, KernelRefused: /proc cannot be listed.
    """
    page = host.page_size(root)
    processes: dict[int, Process] = {}
    hidden: list[int] = []
    silent: list[Silent] = []
    listed = [int(name) for name in tree.names(root, "/proc") if name.isdecimal()] if among is None else list(among)
    shown = patient.each(listed, lambda pid: _shown(root, pid, page, closed))
    for pid in listed:
        answer = shown[pid]
        if isinstance(answer, Gone):
            continue
        if isinstance(answer, Silent):
            silent.append(answer)
            answer = _without_maps(root, pid, page)
        if isinstance(answer, MemconsoleError):
            hidden.append(pid)
            continue
        processes[pid], whole = answer
        if not whole:
            hidden.append(pid)
    unlisted = among is None and tree.live(root) and _FIRST not in listed
    return Census(root, processes, tuple(hidden), unlisted, tuple(silent))


def _shown(root: Root, pid: int, page: int, closed: Collection[int]) -> tuple[Process, bool]:
    """A process with its files and its maps, and whether both were shown."""
    process = _process(root, pid, page)
    if process.kernel or process.state in "ZX" or pid in closed:
        return process, True
    return _with_files(root, process)


def _without_maps(root: Root, pid: int, page: int) -> tuple[Process, bool] | MemconsoleError:
    """A process whose memory map is locked: nothing of it that takes the lock."""
    try:
        process = _process(root, pid, page)
        return msgspec.structs.replace(process, fds=links(root, pid, process.task)), False
    except tree.UNREADABLE as error:
        return error


def process(root: Root, pid: int) -> Process:
    """One process, without its files.

    Raises:
        Gone: there is no such process.
        Denied, KernelRefused, BadFile: it cannot be read.
    """
    return _process(root, pid, host.page_size(root))


def task(root: Root, pid: int) -> int:
    """The thread by which a process is read: its first one, or one that lives where that has left.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    return _process(root, pid, 0).task


class Status(NamedTuple):
    """What /proc/PID/stat does not say: the effective user, and bytes in pages of the hugetlb pool (not in its rss)."""

    uid: int
    hugetlb: int = 0


def status(root: Root, pid: int, task: int | None = None) -> Status:
    """What /proc/PID/status says of a process, by its thread ``task``.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"{tree.of_process(pid, task)}/status"
    found: dict[bytes, list[bytes]] = {}
    for row in tree.read(root, source).split(b"\n"):
        if row.startswith((b"Uid:", b"HugetlbPages:")):
            name, *words = row.split()
            found[name] = words
    users, pages = found.get(b"Uid:", []), found.get(b"HugetlbPages:", [b"0", b"kB"])
    if len(users) != 4 or not users[1].isdigit() or len(pages) != 2 or not pages[0].isdigit():
        raise tree.malformed(source, found)
    return Status(int(users[1]), int(pages[0]) << 10)


def uid(root: Root, pid: int) -> int:
    """The effective user of a process; raises as :func:`status`."""
    return status(root, pid).uid


def command(root: Root, pid: int, task: int | None = None) -> tuple[str, ...]:
    """The words a process was started with (/proc/PID/cmdline), by its thread ``task``.

    Raises:
        Gone, Denied, KernelRefused: it cannot be read.
    """
    return tuple(tree.text(word) for word in tree.read(root, f"{tree.of_process(pid, task)}/cmdline").split(b"\0")[:-1])


def thread_names(root: Root, pid: int) -> dict[int, str]:
    """The names of a process's threads by TID (/proc/PID/task/TID/comm).

    Raises:
        Gone, Denied, KernelRefused: they cannot be listed.
    """
    found = {}
    for tid in threads(root, pid):
        with contextlib.suppress(Gone):
            found[tid] = tree.line(root, f"/proc/{pid}/task/{tid}/comm")
    return found


def _process(root: Root, pid: int, page: int) -> Process:
    """A process by its first thread, or by one that lives where that has left."""
    first = _thread(root, pid, pid, page)
    if first.state not in "ZX" or first.threads < 2:
        return first
    for tid in threads(root, pid):
        with contextlib.suppress(Gone):
            if tid != pid and (other := _thread(root, pid, tid, page)).state not in "ZX":
                return msgspec.structs.replace(
                    first, state=other.state, rss=other.rss, threads=other.threads, task=other.task
                )
    return first


def threads(root: Root, pid: int) -> list[int]:
    """The TIDs of a process's threads.

    Raises:
        Gone, Denied, KernelRefused: they cannot be listed.
    """
    return [int(name) for name in tree.names(root, f"/proc/{pid}/task") if name.isdecimal()]


def _thread(root: Root, pid: int, tid: int, page: int) -> Process:
    source = f"{tree.of_process(pid, tid)}/stat"
    raw = tree.read(root, source)
    opened, closed = raw.find(b"("), raw.rfind(b")")
    words = raw[closed + 1 :].split()
    if opened < 0 or closed < opened or len(words) < 22:
        raise tree.malformed(source, raw)
    try:
        return Process(
            pid=pid,
            comm=tree.text(raw[opened + 1 : closed]),
            state=tree.text(words[0]),
            threads=int(words[17]),
            start_ticks=int(words[19]),
            rss=int(words[21]) * page,
            kernel=bool(int(words[6]) & _PF_KTHREAD),
            fds={},
            maps=b"",
            task=tid,
            parent=int(words[1]),
        )
    except ValueError as error:
        raise tree.malformed(source, raw) from error


def _with_files(root: Root, process: Process) -> tuple[Process, bool]:
    """The same process with its fd links and maps, and whether both were shown.

    It is rebuilt by hand: dataclasses.replace costs as much as a read.
    """
    fds: dict[int, str] = {}
    maps = b""
    whole = True
    try:
        fds = links(root, process.pid, process.task)
    except (Denied, KernelRefused):
        whole = False
    try:
        maps = procmaps.raw(root, process.pid, process.task)
    except (Denied, KernelRefused):
        whole = False
    seen = Process(
        process.pid,
        process.comm,
        process.state,
        process.threads,
        process.start_ticks,
        process.rss,
        process.kernel,
        fds,
        maps,
        process.task,
        process.parent,
    )
    return seen, whole


def links(root: Root, pid: int, task: int | None = None) -> dict[int, str]:
    """The files a process holds (one of its threads, if ``task`` is one), by fd: what its links in /proc/PID/fd say.

    Raises:
        Gone, Denied, KernelRefused, BadFile: they cannot be listed.
    """
    source = f"{tree.of_process(pid, task)}/fd"
    found = {}
    try:
        table = os.open(tree.below(root, source), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in os.listdir(table):
                try:
                    # As bytes, and by its name alone: of a host's thousands of fds each costs.
                    found[int(name)] = tree.text(os.readlink(name.encode("ascii"), dir_fd=table))
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        raise
        finally:
            os.close(table)
    except OSError as error:
        raise tree.failure(source, error) from error
    except ValueError as error:
        raise tree.malformed(source, str(error)) from error
    return found
