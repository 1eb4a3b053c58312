"""One pass over all processes: what each is, which files it holds, what it maps.

    /proc/PID/stat      PID "(" COMM ")" STATE PPID ... threads (20) ... start (22) ... rss (24)
    /proc/PID/fd/N      a link: /memfd:NAME (deleted), anon_inode:kvm-vm, /dev/vfio/12 ...
    /proc/PID/maps      kept as the kernel wrote it; procmaps parses the lines that are asked for

Everything about guests, memfds and who maps what is joined from one Census, so that no process is read twice and the
parts of a Snapshot are of one moment.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator

import msgspec

from memconsole.backend.kernel import host, procmaps, tree
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, Gone
from memconsole.model import Gap

_PF_KTHREAD = 0x00200000


class Process(msgspec.Struct, frozen=True):
    """A process: ``rss`` in bytes, ``start_ticks`` since boot (tells a reused PID), its fd links and raw maps."""

    pid: int
    comm: str
    state: str
    threads: int
    start_ticks: int
    rss: int
    kernel: bool
    fds: dict[int, str]
    maps: bytes

    def holds(self, link: str) -> list[int]:
        """The fds whose link begins with ``link``."""
        return [fd for fd, target in self.fds.items() if target.startswith(link)]


class Census(msgspec.Struct, frozen=True):
    """All processes of one moment; ``hidden`` are those whose files or maps this user may not see."""

    root: Root
    processes: dict[int, Process]
    hidden: tuple[int, ...]

    def gaps(self) -> tuple[Gap, ...]:
        """What this census could not see."""
        if not self.hidden:
            return ()
        total = sum(not process.kernel for process in self.processes.values())
        return (
            Gap(
                "/proc/PID/{fd,maps}",
                f"{len(self.hidden)} of {total} processes do not show their files or their maps",
                "run as root (CAP_SYS_PTRACE); what is hidden from root too, a security policy hides",
            ),
        )

    def mappings(self, objects: Collection[tuple[int, int]], *paths: str) -> Iterator[tuple[int, Vma]]:
        """Who maps files, given as (st_dev, st_ino): each PID with each of its mappings of one.

        They are memfds, or files whose path holds one of ``paths`` (a mount point).

        Raises:
            BadFile: a process's maps are not as the kernel writes them.
        """
        needles = (b" (deleted)", *(os.fsencode(path) for path in paths))
        for process in self.processes.values():
            if any(needle in process.maps for needle in needles):
                for vma in procmaps.parse(process.maps, *needles):
                    if (vma.device, vma.inode) in objects:
                        yield process.pid, vma


def take(root: Root = "/", *, closed: Collection[int] = ()) -> Census:
    """Read every process once; one that ends meanwhile is not in the census.

    The files and maps of ``closed`` processes are left out: those of who holds thousands of fds on our behalf.

    Raises:
        NotFound, Denied, KernelRefused: /proc cannot be listed.
        BadFile: a stat file is not as the kernel writes it.
    """
    page = host.page_size(root)
    processes: dict[int, Process] = {}
    hidden = []
    for name in tree.names(root, "/proc"):
        if not name.isdecimal():
            continue
        pid = int(name)
        try:
            process = _process(root, pid, page)
            if not process.kernel and process.state not in "ZX" and pid not in closed:
                process, whole = _with_files(root, process)
                if not whole:
                    hidden.append(pid)
            processes[pid] = process
        except Gone:
            continue
    return Census(root, processes, tuple(hidden))


def process(root: Root, pid: int) -> Process:
    """One process, without its files.

    Raises:
        Gone: there is no such process.
        Denied, KernelRefused, BadFile: it cannot be read.
    """
    return _process(root, pid, host.page_size(root))


def uid(root: Root, pid: int) -> int:
    """The effective user of a process (/proc/PID/status).

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    source = f"/proc/{pid}/status"
    for row in tree.read(root, source).split(b"\n"):
        if row.startswith(b"Uid:"):
            words = row.split()
            if len(words) == 5 and words[2].isdigit():
                return int(words[2])
            raise tree.malformed(source, row)
    raise tree.malformed(source, "no Uid")


def command(root: Root, pid: int) -> tuple[str, ...]:
    """The words a process was started with (/proc/PID/cmdline).

    Raises:
        Gone, Denied, KernelRefused: it cannot be read.
    """
    return tuple(tree.text(word) for word in tree.read(root, f"/proc/{pid}/cmdline").split(b"\0")[:-1])


def thread_names(root: Root, pid: int) -> dict[int, str]:
    """The names of a process's threads by TID (/proc/PID/task/TID/comm).

    Raises:
        Gone, Denied, KernelRefused: they cannot be listed.
    """
    found = {}
    for name in tree.names(root, f"/proc/{pid}/task"):
        try:
            found[int(name)] = tree.line(root, f"/proc/{pid}/task/{name}/comm")
        except (Gone, ValueError):
            continue
    return found


def _process(root: Root, pid: int, page: int) -> Process:
    source = f"/proc/{pid}/stat"
    raw = tree.read(root, source)
    opened, closed = raw.find(b"("), raw.rfind(b")")
    words = raw[closed + 1 :].split()
    if opened < 0 or closed < opened or len(words) < 22:
        raise tree.malformed(source, raw)
    try:
        return Process(
            pid=pid,
            comm=tree.text(raw[opened + 1 : closed]),
            state=words[0].decode("ascii"),
            threads=int(words[17]),
            start_ticks=int(words[19]),
            rss=int(words[21]) * page,
            kernel=bool(int(words[6]) & _PF_KTHREAD),
            fds={},
            maps=b"",
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
        fds = links(root, process.pid)
    except Denied:
        whole = False
    try:
        maps = procmaps.raw(root, process.pid)
    except Denied:
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
    )
    return seen, whole


def links(root: Root, pid: int) -> dict[int, str]:
    """The files a process holds, by fd: what its links in /proc/PID/fd say.

    Raises:
        Gone, Denied, KernelRefused, BadFile: they cannot be listed.
    """
    source = f"/proc/{pid}/fd"
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
