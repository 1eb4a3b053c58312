"""The host: its memory, physical addresses, devdax devices, and its half of live update."""

from __future__ import annotations

from memconsole.model.base import Value


class Host(Value, frozen=True):
    """The machine a Snapshot was taken on (uname, /proc/sys/kernel/random/boot_id, /proc/uptime)."""

    name: str
    kernel: str
    arch: str
    boot_id: str
    cpus: int
    page_size: int
    uptime_s: float
    tool: str


class Range(Value, frozen=True):
    """A range of physical addresses with its owner's name (/proc/iomem, /sys/firmware/memmap); ``end`` is exclusive."""

    start: int
    end: int
    name: str
    depth: int = 0

    @property
    def is_ram(self) -> bool:
        """Whether it is the kernel's memory: that of the firmware, or of a driver (``System RAM (kmem)``)."""
        return self.name == "System RAM" or self.name.startswith("System RAM (")


class Node(Value, frozen=True):
    """A NUMA node (/sys/devices/system/node/nodeN/meminfo, cpulist).

    ``ranges`` of physical addresses are those of its memory blocks (nodeN/memoryM, memory/block_size_bytes); none where
    the kernel has no memory blocks.
    """

    number: int
    total: int
    free: int
    cpus: str = ""
    ranges: tuple[Range, ...] = ()


class HugePool(Value, frozen=True):
    """A pool of hugetlb pages (/sys/kernel/mm/hugepages/hugepages-*)."""

    page_size: int
    total: int
    free: int
    reserved: int = 0
    surplus: int = 0


class Memory(Value, frozen=True):
    """The host's memory (/proc/meminfo), its nodes and its huge page pools; bytes."""

    total: int
    free: int
    available: int
    shmem: int = 0
    huge_shmem: int = 0
    swap_total: int = 0
    swap_free: int = 0
    shmem_thp: str = ""
    nodes: tuple[Node, ...] = ()
    pools: tuple[HugePool, ...] = ()


class Dax(Value, frozen=True):
    """A devdax device (/sys/bus/dax/devices/daxN.M)."""

    name: str
    size: int
    node: int = -1
    align: int = 0
    start: int = 0


class LiveSession(Value, frozen=True):
    """A session of live update that is open: who holds its file (/proc/PID/fd), and what custody calls it, if it does.

    ``session:`` in custody is one of this kernel, ``incoming:`` one of the kernel before that is kept.
    """

    name: str
    holders: tuple[int, ...]
    custody: str = ""


class Survival(Value, frozen=True):
    """What of the kernel half of live update this host has (/sys/kernel/debug/kho, /dev/liveupdate, /proc/cmdline).

    ``preserved`` bytes are in KHO's tree of pages, in ``runs``; None: no session is open, or ``unread`` says why.
    """

    kho: bool = False
    luo: bool = False
    kho_cmdline: bool = False
    luo_cmdline: bool = False
    scratch: tuple[Range, ...] = ()
    incoming: tuple[str, ...] = ()
    outgoing: tuple[str, ...] = ()
    kexec_count: int = 0
    detail: str = ""
    sessions: tuple[LiveSession, ...] = ()
    preserved: int | None = None
    runs: int = 0
    unread: str = ""
