"""The Snapshot and what it is made of: frozen, typed, serialisable; no I/O.

Everything that is shown is a function of one Snapshot. Kernel truth and ledger are kept apart: what was *meant*
(by the ledger) stands in an entity's own fields, what *is* (by the kernel's readers) stands under ``seen``. Where
the two differ, the Snapshot carries a Finding; where the kernel would not say, it carries a Gap.

Units: sizes and addresses in bytes, times in nanoseconds since the epoch (``*_ns``), pages of ``page_size`` bytes.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

SNAPSHOT_FORMAT: Literal["memconsole.snapshot"] = "memconsole.snapshot"
SNAPSHOT_VERSION = 1


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The base of every value: immutable, compared by content, read back strictly.

    Values form trees, never cycles; the garbage collector need not walk the tens of thousands of a large Snapshot.
    """


# --- words ----------------------------------------------------------------------------------------------------


class RegionState(enum.StrEnum):
    """Where a region stands in its life (DESIGN section 2)."""

    RESERVED = "reserved"
    MAPPED = "mapped"
    FROZEN = "frozen"
    PRESERVED = "preserved"
    RESTORED = "restored"
    RELEASED = "released"


class GuestKind(enum.StrEnum):
    """What a guest is: a VM we run, a process that joined, or a VM that runs here without us."""

    CANARY = "canary"
    QEMU = "qemu"
    PROCESS = "process"
    FOREIGN = "foreign"


class GuestState(enum.StrEnum):
    """Whether a guest runs; ``gone`` is a guest whose process ended without being stopped.

    ``suspended``: to RAM, by itself; ``paused``: its vCPUs were stopped from outside.
    """

    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    GONE = "gone"


class GrantState(enum.StrEnum):
    """``offered``: the process may map it and has not said it did; ``mapped``; ``revoked``."""

    OFFERED = "offered"
    MAPPED = "mapped"
    REVOKED = "revoked"


class Access(enum.StrEnum):
    """What a grant allows."""

    RO = "ro"
    RW = "rw"


class Severity(enum.StrEnum):
    """How bad a finding is: ``error`` loses memory or mixes owners, ``warning`` will, ``info`` is worth knowing."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Rung(enum.StrEnum):
    """The rungs of the revoke ladder, mildest first."""

    ASK = "ask"
    PROTECT = "protect"
    COPY = "copy"
    KILL = "kill"


class RevokeOutcome(enum.StrEnum):
    """``cut``: no mapping left; ``proved``: no pin either; ``quarantined``: a pin remains, the frames are nobody's."""

    CUT = "cut"
    PROVED = "proved"
    QUARANTINED = "quarantined"


# --- the host ---------------------------------------------------------------------------------------------------


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


class Node(Value, frozen=True):
    """A NUMA node (/sys/devices/system/node/nodeN/meminfo, cpulist)."""

    number: int
    total: int
    free: int
    cpus: str = ""


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


class Range(Value, frozen=True):
    """A range of physical addresses with its owner's name (/proc/iomem, /sys/firmware/memmap); ``end`` is exclusive."""

    start: int
    end: int
    name: str
    depth: int = 0


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


# --- regions, guests, grants ------------------------------------------------------------------------------------


class Segment(Value, frozen=True):
    """One memfd of a region, by the inode its mappings show in /proc/PID/maps."""

    inode: int
    device: int
    size: int


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


class Region(Value, frozen=True):
    """Named memory set aside for one owner."""

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
    """A vCPU by its file descriptor (``anon_inode:kvm-vcpu:N``) and, where it can be told, its thread."""

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
    """Guest RAM as one VMA of its process; ``gpa`` where the layout is known, ``region`` where it is ours."""

    start: int
    size: int
    resident: int
    gpa: int | None = None
    region: str | None = None
    backing: str = ""


class GuestSeen(Value, frozen=True):
    """What the kernel says of a guest's process (/proc/PID); ``rss`` in bytes."""

    comm: str
    uid: int
    rss: int
    threads: int
    vcpus: tuple[Vcpu, ...] = ()
    ram: tuple[RamBlock, ...] = ()


class Guest(Value, frozen=True):
    """What owns regions and holds grants: a VM or any process."""

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
    seen: GuestSeen | None = None


# --- devices ----------------------------------------------------------------------------------------------------


class Device(Value, frozen=True):
    """A PCI function (/sys/bus/pci/devices/BDF) behind a bridge, if any; ``holders`` are PIDs that have it by VFIO."""

    bdf: str
    vendor: int
    device: int
    class_code: int
    driver: str | None = None
    group: int | None = None
    node: int = -1
    bridge: str | None = None
    holders: tuple[int, ...] = ()


class Window(Value, frozen=True):
    """An MMIO range of a device (a row of /sys/bus/pci/devices/BDF/resource); ``holders`` are PIDs that map it."""

    id: str
    bdf: str
    bar: int
    start: int
    size: int
    io: bool = False
    prefetchable: bool = False
    wide: bool = False
    driver: str | None = None
    claimed: str | None = None
    holders: tuple[int, ...] = ()
    grant: str | None = None
    guest: str | None = None


class Reserved(Value, frozen=True):
    """An IOVA range a domain must not use (/sys/kernel/iommu_groups/N/reserved_regions)."""

    start: int
    end: int
    kind: str


class Domain(Value, frozen=True):
    """An IOMMU address space: its group's type, devices and, where the kernel shows page tables, IOVA extents."""

    group: int
    kind: str
    iommu: str
    devices: tuple[str, ...] = ()
    reserved: tuple[Reserved, ...] = ()
    mapped: int | None = None
    extents: int | None = None
    why_not: str = ""


class Iommu(Value, frozen=True):
    """An IOMMU of the host (/sys/class/iommu/NAME)."""

    name: str
    kind: str
    devices: tuple[str, ...] = ()
    detail: str = ""


# --- what was noticed -------------------------------------------------------------------------------------------


class Finding(Value, frozen=True):
    """A difference between what should be and what is."""

    id: str
    severity: Severity
    subject: str
    what: str
    evidence: str = ""
    remedy: str = ""


class Gap(Value, frozen=True):
    """A source that could not be read: what is missing from this Snapshot, why, and what to do about it."""

    source: str
    why: str
    remedy: str = ""


class Event(Value, frozen=True):
    """Something that happened, in the order it did; ``peer`` is who asked."""

    seq: int
    at_ns: int
    kind: str
    subject: str
    text: str
    peer: str = ""


class Capability(Value, frozen=True):
    """One line of ``doctor``: something this host can do or cannot, why, and the remedy."""

    id: str
    title: str
    level: Literal["yes", "partly", "no"]
    why: str = ""
    remedy: str = ""


# --- the handoff ------------------------------------------------------------------------------------------------


class Condition(Value, frozen=True):
    """One way to lose memory, or to make the blackout long, and whether this host is free of it.

    An ``error`` that is not ``ok`` refuses the handoff, a ``warning`` is worth reading before it.
    """

    id: str
    severity: Severity
    ok: bool
    what: str
    evidence: str = ""
    remedy: str = ""


class HandoffState(enum.StrEnum):
    """``running``: under way; ``done``; ``failed``: undone, every guest runs where it was."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Phase(Value, frozen=True):
    """One phase of a handoff, ns since it began; ``end_ns`` is None while it lasts."""

    id: str
    text: str
    start_ns: int
    end_ns: int | None = None
    blackout: bool = False


class Carried(Value, frozen=True):
    """A guest of a handoff: whether it came back, and how long it stood still (``by`` its own count, or the VMM's)."""

    name: str
    kind: GuestKind
    memory: int
    back: bool = False
    pid: int | None = None
    blackout_ns: int | None = None
    by: str = ""
    why: str = ""


class Kept(Value, frozen=True):
    """A region of a handoff: ``same``: its pages are where they were; ``contents``: what is in them is what was."""

    name: str
    size: int
    runs: int
    preserve_ns: int = 0
    retrieve_ns: int = 0
    verify_ns: int = 0
    same: bool | None = None
    contents: bool | None = None


class CarriedDevice(Value, frozen=True):
    """A device of a handoff; ``pages`` and ``runs`` of its IOVA table, as ``source`` (kernel, ledger) said.

    ``how`` it came along: ``rebuilt``, ``preserved`` by the kernel, or ``kept`` in custody (a rehearsal); ``why`` it
    had to be rebuilt, or is not back. ``same``: each IOVA leads to the frame it led to. ns since the handoff began.
    """

    bdf: str
    guest: str
    pages: int
    runs: int
    source: str
    how: str
    quiesced_ns: int | None = None
    back_ns: int | None = None
    same: bool | None = None
    why: str = ""


class CarriedWindow(Value, frozen=True):
    """A window of a handoff: whether its guest mapped it again."""

    window: str
    guest: str
    grant: str
    back: bool = False
    why: str = ""


class HandoffReport(Value, frozen=True):
    """The last handoff, or the one under way; the phases of ``blackout`` are those in which guests stand still."""

    kind: Literal["run", "rehearse"]
    state: HandoffState
    began_ns: int
    from_kernel: str = ""
    to_kernel: str = ""
    phases: tuple[Phase, ...] = ()
    guests: tuple[Carried, ...] = ()
    regions: tuple[Kept, ...] = ()
    devices: tuple[CarriedDevice, ...] = ()
    windows: tuple[CarriedWindow, ...] = ()
    why: str = ""
    notes: tuple[str, ...] = ()


# --- the Snapshot -----------------------------------------------------------------------------------------------


class TableRef(Value, frozen=True):
    """An ExtentTable that belongs to a Snapshot: its key (``region:NAME``, ``guest:NAME``), rows and page size."""

    key: str
    rows: int
    page_size: int


class Snapshot(Value, frozen=True, kw_only=True):
    """One immutable picture of a host: kernel truth, ledger, and where they differ."""

    format: Literal["memconsole.snapshot"] = SNAPSHOT_FORMAT
    version: Annotated[int, Meta(ge=1)] = SNAPSHOT_VERSION
    taken_ns: int
    host: Host
    memory: Memory
    survival: Survival = Survival()
    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()
    grants: tuple[Grant, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()
    devices: tuple[Device, ...] = ()
    windows: tuple[Window, ...] = ()
    iommus: tuple[Iommu, ...] = ()
    domains: tuple[Domain, ...] = ()
    iomem: tuple[Range, ...] = ()
    firmware: tuple[Range, ...] = ()
    dax: tuple[Dax, ...] = ()
    findings: tuple[Finding, ...] = ()
    gaps: tuple[Gap, ...] = ()
    events: tuple[Event, ...] = ()
    tables: tuple[TableRef, ...] = ()
    handoff: HandoffReport | None = None


# --- what is done -----------------------------------------------------------------------------------------------


class Effect(Value, frozen=True):
    """One step of a plan: its id (also its fault point), what it does, and how it is undone."""

    id: str
    text: str
    undo: str = ""


class Refusal(Value, frozen=True):
    """Why a plan cannot be applied: a named condition and its remedy."""

    code: str
    what: str
    why: str = ""
    remedy: str = ""


class Danger(enum.StrEnum):
    """``safe`` changes nothing that matters; ``changes`` can be undone; ``destroys`` wants a typed name."""

    SAFE = "safe"
    CHANGES = "changes"
    DESTROYS = "destroys"


class Plan(Value, frozen=True):
    """What an Action would do, in order, and why it would not; ``confirm`` is the name to type, if any.

    A handoff's plan lists its ``conditions``: those that fail, and those that hold.
    """

    action: str
    cli: str
    danger: Danger
    effects: tuple[Effect, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    confirm: str | None = None
    conditions: tuple[Condition, ...] = ()


class RevokeReport(Value, frozen=True):
    """How a revoke ended: the rung it needed, how long it took, and how strong its end is."""

    grant: str
    rung: Rung
    outcome: RevokeOutcome
    took_ns: int
    tried: tuple[Rung, ...] = ()
    note: str = ""


class Outcome(Value, frozen=True):
    """What an applied Action did: the effects in order, the entity it made (``grant`` id, region name), its time."""

    action: str
    subject: str
    text: str
    effects: tuple[Effect, ...] = ()
    took_ns: int = 0
    revoke: RevokeReport | None = None
