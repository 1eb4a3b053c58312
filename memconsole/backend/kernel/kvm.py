"""VMs by what the kernel shows of them: fd links, vCPU threads, and the mappings that are guest RAM.

    anon_inode:kvm-vm           a VM's fd
    anon_inode:kvm-vcpu:ID      a vCPU's fd, by the VMM's id of it: its APIC id on x86, with gaps by sockets and cores
    CPU N/KVM, fc_vcpu N ...    the names VMMs give to vCPU threads, by an index of their own without gaps
    /sys/kernel/debug/kvm/TID-FD/vcpuID/pid     the thread that ran a vCPU last; 0 before the first time

Ids and indexes are two things, in the same order: where there are as many of both, the first is the first.

The kernel exports no memory slots. Guest RAM is told by shape: writable mappings shared with a file (memfd, hugetlbfs,
FUSE, /dev/shm, devdax) of at least 64 KiB, and private memory of at least 32 MiB that is neither heap, stack
nor code; what VMMs map beside it in the same way (registers, rings of I/O, graphics, sound) is told by its path.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection

import msgspec

from memconsole.backend.kernel import census as census_of
from memconsole.backend.kernel import procmaps, tree
from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.procmaps import Vma
from memconsole.errors import Denied, NotFound
from memconsole.model import GuestSeen, RamBlock, Vcpu

_VCPU_LINK = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
_VCPU_THREAD = re.compile(r"CPU (\d+)/(?:KVM|TCG)|(?:fc_|crosvm_)?vcpu[ _-]?(\d+)")
_OPTION = re.compile(r"(?:(?P<key>[^=,]*)=)?(?P<value>(?:[^,]|,,)*)(?:,|\Z)", re.DOTALL)
_DEBUGFS = "/sys/kernel/debug/kvm"
_SHARED_MIN = 64 << 10
_PRIVATE_MIN = 32 << 20
_NOT_RAM = (
    *("anon_inode:", "socket:", "/sys/", "/proc/", "/dev/"),
    *("/[aio]", "/SYSV", "/dmabuf:", "/drm mm object", "/i915"),
    *("/memfd:pulseaudio", "/memfd:pipewire", "/memfd:xshmfence", "/memfd:wayland", "/memfd:gdk-wayland"),
    "/memfd:displaysurface",  # what QEMU 10 draws on
    "/memfd:mesa",
)
"""Paths, by how they begin, of what a VMM maps beside its guest's RAM: devices, rings, graphics, sound."""
_RAM = ("/dev/shm/", "/dev/huge", "/dev/dax", "/dev/zero")  # noqa: S108 - what a mapping is called
"""... and of what of that is RAM all the same."""


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


def machine(census: Census, process: Process) -> Machine:
    """One process as a guest, VM or not; sizes in bytes, ``gpa`` and ``region`` left for those who know them.

    Raises:
        Gone, Denied, KernelRefused, BadFile: it cannot be read.
    """
    vmas = guest_ram(process)
    words = census_of.command(census.root, process.pid, process.task)
    status = census_of.status(census.root, process.pid, process.task)
    seen = GuestSeen(
        comm=process.comm,
        uid=status.uid,
        rss=process.rss + status.hugetlb,
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
    if not vma.writable or (vma.path.startswith(_NOT_RAM) and not vma.path.startswith(_RAM)):
        return False
    if vma.shared:
        return vma.size >= _SHARED_MIN
    executable = vma.perms[2:3] == "x"  # what a VMM has translated
    return vma.size >= _PRIVATE_MIN and not executable and vma.path not in {"[heap]", "[stack]"}


def _blocks(census: Census, process: Process, vmas: tuple[Vma, ...]) -> tuple[RamBlock, ...]:
    try:
        found = procmaps.resident(census.root, process.pid, vmas, process.task)
    except Denied:
        found = [0] * len(vmas)
    return tuple(
        RamBlock(vma.start, vma.size, resident, backing=vma.path or "anonymous", offset=vma.offset)
        for vma, resident in zip(vmas, found, strict=True)
    )


def _vcpus(census: Census, process: Process) -> tuple[Vcpu, ...]:
    indexes = sorted({int(match[1]) for link in process.fds.values() if (match := _VCPU_LINK.fullmatch(link))})
    if not indexes:
        return ()
    names = census_of.thread_names(census.root, process.pid)
    named = sorted(
        (int(match[1] or match[2]), tid) for tid, name in names.items() if (match := _VCPU_THREAD.fullmatch(name))
    )
    if len(named) == len(indexes):
        return tuple(Vcpu(index, tid) for index, (_, tid) in zip(indexes, named, strict=True))
    ran = _ran_by(census, process, names)
    # Without gaps, an index can only be the id.
    by_number = dict(named) if indexes == list(range(len(indexes))) else {}
    return tuple(Vcpu(index, ran.get(index, by_number.get(index))) for index in indexes)


def _ran_by(census: Census, process: Process, threads: Collection[int]) -> dict[int, int]:
    """The thread of each vCPU that has run, as far as debugfs is shown; it counts PIDs of the first namespace."""
    found = {}
    with contextlib.suppress(Denied, NotFound):
        for name in tree.names(census.root, _DEBUGFS):
            maker, _, fd = name.partition("-")
            if not (maker.isdecimal() and fd.isdecimal() and int(maker) in threads and int(fd) in process.fds):
                continue
            for vcpu in tree.names(census.root, f"{_DEBUGFS}/{name}"):
                if vcpu.startswith("vcpu") and vcpu[4:].isdecimal():
                    with contextlib.suppress(*tree.UNREADABLE):  # its thread is not known then
                        tid = tree.number(census.root, f"{_DEBUGFS}/{name}/{vcpu}/pid", 10)
                        if tid in threads:
                            found[int(vcpu[4:])] = tid
    return found


def _name(words: tuple[str, ...], process: Process) -> str:
    """What QEMU's ``-name`` calls the guest, else the process's name."""
    said = [value for flag, value in itertools.pairwise(words) if flag in {"-name", "--name"}]
    names = [value for each in said for key, value in options(each, "guest") if key == "guest"]
    return (names[-1] if names else "") or process.comm


def options(text: str, first: str) -> list[tuple[str, str]]:
    """The pairs of one of QEMU's options, as its parser (util/qemu-option.c) reads them.

    A word without ``=`` is the value of ``first`` where it stands first, else a flag that is on; ``,,`` is a comma.
    """
    found = []
    for at, match in enumerate(_OPTION.finditer(text)):
        key, value = match["key"], match["value"].replace(",,", ",")
        if key is not None:
            found.append((key, value))
        elif at == 0:
            found.append((first, value))
        elif value:
            found.append((value, "on"))
    return found
