"""VMs by what the kernel shows of them: fd links, vCPU threads, and the mappings that are guest RAM.

    anon_inode:kvm-vm           a VM's fd
    anon_inode:kvm-vcpu:N       a vCPU's fd
    CPU N/KVM, fc_vcpu N ...    the names VMMs give to vCPU threads

The kernel exports no memory slots. Guest RAM is told by shape: writable mappings shared with a file (memfd, hugetlbfs,
FUSE, /dev/shm, devdax) of at least 64 KiB, and private memory of at least 32 MiB that is neither heap nor stack.
"""

from __future__ import annotations

import itertools
import re

import msgspec

from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import procmaps
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.procmaps import Vma
from memconsole.errors import Denied, Gone
from memconsole.model import GuestSeen, RamBlock, Vcpu

_VCPU_LINK = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
_VCPU_THREAD = re.compile(r"CPU (\d+)/(?:KVM|TCG)|(?:fc_|crosvm_)?vcpu[ _-]?(\d+)")
_SHARED_MIN = 64 << 10
_PRIVATE_MIN = 32 << 20
_NOT_RAM = ("anon_inode:", "socket:", "/dev/kvm", "/dev/vfio/", "/sys/")


class Machine(msgspec.Struct, frozen=True):
    """A process that holds a VM: ``vmas`` are its guest RAM, in the order of ``seen.ram``."""

    pid: int
    start_ticks: int
    name: str
    command: tuple[str, ...]
    vmas: tuple[Vma, ...]
    seen: GuestSeen

    @property
    def memory(self) -> int:
        """Bytes of guest RAM."""
        return sum(block.size for block in self.seen.ram)


def machines(census: Census) -> tuple[Machine, ...]:
    """Every process that holds a VM's fd, by PID, whoever started it; one that ends meanwhile is left out.

    Raises:
        Denied, KernelRefused, BadFile: one of them cannot be read.
    """
    found = []
    for process in census.processes.values():
        if process.holds("anon_inode:kvm-vm"):
            try:
                found.append(machine(census, process))
            except Gone:
                continue
    return tuple(found)


def machine(census: Census, process: Process) -> Machine:
    """One process as a guest, VM or not; sizes in bytes, ``gpa`` and ``region`` left for those who know them.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    vmas = guest_ram(process)
    words = census_of.command(census.root, process.pid)
    seen = GuestSeen(
        comm=process.comm,
        uid=census_of.uid(census.root, process.pid),
        rss=process.rss,
        threads=process.threads,
        vcpus=_vcpus(census, process),
        ram=_blocks(census, process, vmas),
    )
    return Machine(process.pid, process.start_ticks, _name(words, process), words, vmas, seen)


def guest_ram(process: Process) -> tuple[Vma, ...]:
    """The mappings of a process that have the shape of guest RAM, by address.

    Raises:
        BadFile: its maps are not as the kernel writes them.
    """
    return tuple(vma for vma in procmaps.parse(process.maps, b" rw") if _is_ram(vma))


def _is_ram(vma: Vma) -> bool:
    if not vma.writable or vma.path.startswith(_NOT_RAM):
        return False
    if vma.shared:
        return vma.size >= _SHARED_MIN
    return vma.size >= _PRIVATE_MIN and vma.path not in {"[heap]", "[stack]"}


def _blocks(census: Census, process: Process, vmas: tuple[Vma, ...]) -> tuple[RamBlock, ...]:
    try:
        found = procmaps.resident(census.root, process.pid, vmas)
    except Denied:
        found = [0] * len(vmas)
    return tuple(
        RamBlock(vma.start, vma.size, resident, backing=vma.path or "anonymous")
        for vma, resident in zip(vmas, found, strict=True)
    )


def _vcpus(census: Census, process: Process) -> tuple[Vcpu, ...]:
    indexes = sorted({int(match[1]) for link in process.fds.values() if (match := _VCPU_LINK.fullmatch(link))})
    if not indexes:
        return ()
    threads = {}
    for tid, name in census_of.thread_names(census.root, process.pid).items():
        if match := _VCPU_THREAD.fullmatch(name):
            threads[int(match[1] or match[2])] = tid
    return tuple(Vcpu(index, threads.get(index)) for index in indexes)


def _name(words: tuple[str, ...], process: Process) -> str:
    """QEMU's ``-name [guest=]NAME[,...]``, else the process's name."""
    for flag, value in itertools.pairwise(words):
        if flag in {"-name", "--name"}:
            parts = value.split(",")
            return next((part[6:] for part in parts if part.startswith("guest=")), parts[0]) or process.comm
    return process.comm
