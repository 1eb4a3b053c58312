"""Regions, guests and grants: what was meant, and what the kernel says of it under ``seen``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from memconsole.model.base import Value
from memconsole.model.managed import Managed
from memconsole.model.process import ProcessId
from memconsole.model.usage import Usage
from memconsole.model.words import Access, GrantState, GuestKind, GuestState, RegionState


class FrameState(Value, frozen=True):
    """A page frame as the kernel shows it: its flags (/proc/kpageflags), and how often it is mapped (kpagecount)."""

    pfn: int
    flags: tuple[str, ...]
    mapped: int


class Segment(Value, frozen=True):
    """One memfd of a region, by the inode its mappings show in /proc/PID/maps.

    One that is a piece of a device begins at byte ``start`` of it, and ``whole`` is the device's number (st_rdev).
    """

    inode: int
    device: int
    size: int
    start: int = 0
    whole: int = 0


class RegionSeen(Value, frozen=True):
    """What the kernel says of a region: frames in place, seals, mappers; ``runs`` once its PFNs were scanned.

    ``moved`` bytes of it lay in other frames at a later scan than at the one before.
    ``preserved`` bytes of it are in KHO's tree of pages to hand over; None: nobody had a session open. ``retrieved``:
    it came from the kernel before (a memfd without a name).
    """

    resident: int
    seals: tuple[str, ...] = ()
    mappers: tuple[int, ...] = ()
    runs: int | None = None
    huge: int | None = None
    scanned_ns: int | None = None
    moved: int = 0
    preserved: int | None = None
    retrieved: bool = False


class RegionFile(Value, frozen=True):
    """The file that a region is to a user of this host: ``path`` below ``files`` on the mount.

    It is of ``user`` and ``group`` (numbers), with the permissions ``mode``.
    """

    path: str
    user: int = 0
    group: int = 0
    mode: int = 0o600


class Region(Value, frozen=True):
    """Named memory set aside for one owner; ``block``: of an adopted guest's RAM, what its QEMU calls it.

    ``file``: of one that is a user's file, where it is shown, and to whom.
    """

    name: str
    store: str
    size: int
    page_size: int
    state: RegionState
    node: int | None = None
    prefault: bool = False
    created_ns: int = 0
    segments: tuple[Segment, ...] = ()
    grants: tuple[str, ...] = ()
    seen: RegionSeen | None = None
    block: str = ""
    file: RegionFile | None = None


class GrantMapping(Value, frozen=True):
    """One VMA through which a process reaches a grant (/proc/PID/maps); ``offset`` into the region."""

    pid: int
    start: int
    end: int
    offset: int
    perms: str


class Faults(Value, frozen=True):
    """The page faults of a lazy grant, as they were served: ``present`` bytes were put in place by them.

    ``minor`` found the page in the region, ``missing`` had it made; ``rate`` are those of the last second, ``refused``
    found no memory and are tried again. ``served`` is false while nobody serves: the guest then waits where it faults.
    """

    served: bool
    minor: int = 0
    missing: int = 0
    present: int = 0
    rate: int = 0
    refused: int = 0
    busy_ns: int = 0
    longest_ns: int = 0
    batch: int = 0


class Grant(Value, frozen=True):
    """The revocable right of one guest to map a range of a region; ``lazy``: put in place when first touched."""

    id: str
    region: str
    guest: str
    offset: int
    length: int
    access: Access
    state: GrantState
    gpa: int | None = None
    export: str = "fd"
    dma: str | None = None
    created_ns: int = 0
    lazy: bool = False
    faults: Faults | None = None
    seen: tuple[GrantMapping, ...] = ()


class Quarantine(Value, frozen=True):
    """Frames a revoke left behind because somebody pinned them before: nobody gets them until the pin drops.

    The region's contents are elsewhere by then; what the pin still shows are the old bytes. ``id`` is the
    grant's, with a number where there is a second one.
    """

    id: str
    region: str
    guest: str
    size: int
    since_ns: int
    why: str


class Vcpu(Value, frozen=True):
    """A vCPU by its file descriptor (``anon_inode:kvm-vcpu:N``), or by its VMM's own word where it runs without KVM.

    ``tid`` is its thread, where that can be told.
    """

    index: int
    tid: int | None = None


class Progress(Value, frozen=True):
    """What a canary says of itself: beats counted, pages checked, wrong bytes, and the longest pause it noticed.

    ``why``: why it cannot go on; empty while it can.
    """

    runs_as: Literal["kvm", "process"]
    beats: int
    checked: int
    wrong: int
    gap_ns: int
    gaps: int
    why: str = ""


class RamBlock(Value, frozen=True):
    """Guest RAM as one VMA of its process; ``gpa`` where the layout is known, ``region`` where it is ours.

    ``offset`` of its start in what backs it. ``mapped`` bytes have page table entries, ``huge`` of them by 2 MiB or
    more each; ``eligible``: whether the kernel would map it so (/proc/PID/smaps). None: it is not known.
    """

    start: int
    size: int
    resident: int
    gpa: int | None = None
    region: str | None = None
    backing: str = ""
    offset: int | None = None
    mapped: int | None = None
    huge: int | None = None
    eligible: bool | None = None


class Helper(Value, frozen=True):
    """A process that works for a guest and maps what that was granted (a vhost-user backend)."""

    pid: int
    start_ticks: int
    command: tuple[str, ...] = ()

    @property
    def process(self) -> ProcessId:
        """Which process it is."""
        return ProcessId(self.pid, self.start_ticks)


class GuestSeen(Value, frozen=True):
    """What the kernel says of a guest's process (/proc/PID); ``rss`` in bytes.

    ``vcpus`` are None of a VM of which neither the kernel nor its VMM says how many it has; ``usage`` is None where it
    was not asked for. ``helpers`` are processes that map what a QEMU was granted and are connected to it by a unix
    socket (/proc/PID/fd, sock_diag).
    """

    comm: str
    uid: int
    rss: int
    threads: int
    vcpus: tuple[Vcpu, ...] | None = ()
    ram: tuple[RamBlock, ...] = ()
    usage: Usage | None = None
    helpers: tuple[Helper, ...] = ()

    @property
    def huge(self) -> int | None:
        """Bytes of its RAM that are mapped by huge pages; None where it has none, or a part was not looked at."""
        return _sum_known([block.huge for block in self.ram])

    @property
    def mapped(self) -> int | None:
        """Bytes of its RAM that have page table entries; None where it has none, or a part was not looked at."""
        return _sum_known([block.mapped for block in self.ram])


def _sum_known(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


class Service(Value, frozen=True):
    """How a guest that is a service is saved and started again: by its systemd ``unit``, or by ``command``.

    ``command`` runs as ``user`` and ``group`` (numbers) in ``directory``. ``save`` and ``ready`` are lines for /bin/sh:
    the first has it save and is waited for, the second succeeds once it answers. ``save_signal`` ends it, saved;
    ``within`` seconds for each of these.

    With neither a unit nor a command it is a user of this host, whoever starts what: ``quota`` bytes at most of
    regions are that user's files (None: any number).
    """

    unit: str = ""
    command: tuple[str, ...] = ()
    user: int = 0
    group: int = 0
    directory: str = "/"
    save_signal: str = "SIGTERM"
    save: str = ""
    ready: str = ""
    within: float = 60.0
    quota: int | None = None

    @property
    def is_user(self) -> bool:
        """Whether it is a user of this host, and no one program."""
        return not self.unit and not self.command


class Guest(Value, frozen=True):
    """What owns regions and holds grants: a VM or any process, and what its processes fork.

    ``silent``: why it does not answer, empty while it does; its ``progress`` is then what it said at ``answered_ns``,
    None if it never answered. ``ended``: what ended one that is gone, if known. ``helpers`` are those that an operator
    named. ``managed``: what another manager of VMs says of it, where one runs it. ``service``: a process that
    is told to save before a handoff, and started again after it. ``adopted``: another program started it, and
    its RAM is in custody.
    """

    name: str
    kind: GuestKind
    state: GuestState
    pid: int | None
    start_ticks: int | None = None
    memory: int = 0
    command: tuple[str, ...] = ()
    grants: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    agent: bool = False
    created_ns: int = 0
    progress: Progress | None = None
    answered_ns: int | None = None
    silent: str = ""
    seen: GuestSeen | None = None
    ended: str = ""
    helpers: tuple[Helper, ...] = ()
    managed: Managed | None = None
    service: Service | None = None
    adopted: bool = False

    @property
    def process(self) -> ProcessId | None:
        """Which process it is; None of one that has none, or whose start is not known."""
        return ProcessId.known(self.pid, self.start_ticks)

    @property
    def is_user(self) -> bool:
        """Whether it is a user of this host, whose files regions are: any process of that user."""
        return self.service is not None and self.service.is_user and not self.command

    @property
    def its_process(self) -> str:
        """Its process in words, with its PID where there is one."""
        return "its process" if self.pid is None else f"its process {self.pid}"
