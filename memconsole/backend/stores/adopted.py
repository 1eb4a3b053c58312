"""The store of RAM that another program made: a memfd, or a file on a tmpfs, that a running QEMU maps shared.

Nothing of it is changed: no seal, no size, no page. Custody gets a descriptor of the file that the process has, known
by device and inode; so the memory stays when the process ends. What such a file is:

    memfd       its device is that of every memfd (the kernel's own mount of tmpfs)
    a file      its device is a mount that the process sees (/proc/PID/mountinfo): a tmpfs will do, nothing else
    hugetlb     neither: a memfd of huge pages is on a mount of its own
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

from memconsole.backend.kernel import census, kvm, mounts, tree
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.kernel.tree import Root
from memconsole.errors import Denied, Gone, GuestError, MemconsoleError
from memconsole.model import Guest

NAME = "adopted"


class RamFile(NamedTuple):
    """A file that a process maps shared and that has the shape of RAM, whole: ``start`` is where byte 0 of it is.

    ``kind`` is memfd, file, hugetlb, or the filesystem it is on; ``path`` what its mapping is called.
    """

    start: int
    size: int
    device: int
    inode: int
    kind: str
    path: str

    @property
    def identity(self) -> tuple[int, int]:
        """What it is, whatever it is called."""
        return self.device, self.inode

    @property
    def can_be_held(self) -> bool:
        """Whether custody can keep it for the next kernel."""
        return self.kind in {"memfd", "file"}


def files(vmas: Collection[Vma], kinds: Mapping[int, str]) -> tuple[RamFile, ...]:
    """The files behind mappings, each once, by address; a file that is mapped in pieces is as long as they reach."""
    found: dict[tuple[int, int], RamFile] = {}
    for vma in sorted((each for each in vmas if each.shared and each.inode), key=lambda vma: vma.start):
        start, end = vma.start - vma.offset, vma.offset + vma.size
        before = found.get((vma.device, vma.inode))
        if before is not None and before.start != start:
            continue  # mapped a second time, elsewhere
        size = max(end, before.size if before is not None else 0)
        kind = kinds.get(vma.device, "hugetlb")
        found[vma.device, vma.inode] = RamFile(start, size, vma.device, vma.inode, kind, vma.path)
    return tuple(found.values())


def files_of(root: Root, guest: Guest) -> tuple[RamFile, ...]:
    """The files that a VM's process maps shared, in the shape of RAM, each once, by address.

    Raises:
        Gone: it ended. Denied, KernelRefused, BadFile: its maps or mounts are not shown.
    """
    seen = census.take(root, among=[guest.pid or 0])
    process = seen.processes.get(guest.pid or 0)
    if process is None or process.id != guest.process:
        raise Gone(f"guest {guest.name} is gone", f"{guest.its_process} ended", "memconsole guests lists the guests")
    if process.pid in seen.hidden:
        raise Denied(
            f"process {process.pid} cannot be inspected", "only root may read its files and maps", "run as root"
        )
    return files(kvm.guest_ram(process), kinds_of(root, process.pid))


def kinds_of(root: Root, pid: int) -> dict[int, str]:
    """What the files on each device are to us, as a process sees the mounts: memfd, file, hugetlb, else the filesystem.

    Raises:
        Gone, Denied, KernelRefused, BadFile: its mounts cannot be read.
    """
    found = {}
    for mount in mounts.of_process(root, pid):
        found[mount.device] = {"tmpfs": "file", "hugetlbfs": "hugetlb"}.get(mount.fstype, mount.fstype)
    fd = os.memfd_create("memconsole-device", os.MFD_CLOEXEC)
    try:
        found[os.fstat(fd).st_dev] = "memfd"
    finally:
        os.close(fd)
    return found


def opened(root: Root, pid: int, file: RamFile) -> int:
    """A descriptor of a file that a process has open, its own file description, for reading and writing.

    Raises:
        GuestError: the process has it open no more. Gone, Denied, KernelRefused: its files are not shown.
    """
    place = f"/proc/{pid}/fd"
    for number, link in census.links(root, pid).items():
        if link.removesuffix(" (deleted)") != file.path:
            continue  # nothing is asked of other files: one on a server that is away would not answer
        path = tree.below(root, f"{place}/{number}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise tree.failure(path, error) from error
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == file.identity:
            return fd
        os.close(fd)
    what = f"process {pid} maps {file.path or 'a file'} and has it open no more"
    raise GuestError(what, f"no descriptor of inode {file.inode} in {place}", "report it: QEMU keeps them open")


def has_name(fd: int) -> bool:
    """Whether a file still has a name in a directory: live update takes none that has."""
    return os.fstat(fd).st_nlink > 0


def why_not(file: RamFile) -> MemconsoleError | None:
    """Why a file of RAM cannot be adopted; None where it can."""
    if file.can_be_held:
        return None
    if file.kind == "hugetlb":
        return GuestError(
            "hugetlb pages are its RAM",
            "live update carries none",
            "replace <hugepages/> in its <memoryBacking> by <source type='memfd'/><access mode='shared'/>, and start"
            " it anew; transparent huge pages (shmem_enabled=advise) bring the same speed",
            code="HugePages",
        )
    return GuestError(
        f"a file of {file.kind} is its RAM ({file.path})",
        "live update carries memfds and files of a tmpfs",
        "set memory_backing_dir in /etc/libvirt/qemu.conf to a directory on a tmpfs, or use <source type='memfd'/>;"
        " then start it anew",
        code="NotInMemory",
    )
