"""A desk as a value: what verbs, revoke and a handoff are planned and run against in the unit tier.

``Facts`` says what is so; ``Desk`` is what :class:`memconsole.backend.desk.Desk` is in shape, made of them. Its memory
is real (sparse memfds of this process, held by a custody of this process), because a memfd wants no privilege; guests,
devices and the answers of the kernel are plain data that a test sets, and looks at afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.custody.names import custody_name
from memconsole.backend.exports.mapped import BlockedMapping, FuseAlias
from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests.base import GuestDriver
from memconsole.backend.holdings import Holdings
from memconsole.backend.kernel.procmaps import Vma
from memconsole.backend.ledger.state import EventRecord, Record, Recorded, State, StateChange, WindowGrant
from memconsole.backend.ledger.writer import carry
from memconsole.backend.managers.guest_memory import Block
from memconsole.backend.observe.mappings import RegionMapping
from memconsole.backend.observe.reach import RegionReach
from memconsole.backend.observe.survey import GuestReply
from memconsole.backend.stores import files, memfd
from memconsole.errors import Denied, Gone, MemconsoleError, NotFound
from memconsole.extents import Extent, ExtentTable
from memconsole.model import (
    Access,
    Finding,
    Grant,
    GrantState,
    Guest,
    GuestKind,
    GuestState,
    HandoffReport,
    Progress,
    Quarantine,
    Region,
    RegionState,
    Unread,
    Vcpu,
    Window,
)
from support.foreign_ram import ForeignRam
from support.trees import Tree

M = 1 << 20
P = ParamSpec("P")
T = TypeVar("T")


def region(name: str = "web", size: int = 4 * M, page: int = 4096, state: RegionState = RegionState.RESERVED) -> Region:
    """A region as the ledger has it; :class:`Desk` gives it the segments that its memory has."""
    return Region(name, "memfd", size, page, state)


def guest(
    name: str = "db",
    kind: GuestKind = GuestKind.PROCESS,
    state: GuestState = GuestState.RUNNING,
    pid: int | None = 4000,
) -> Guest:
    """A guest as the ledger has it."""
    return Guest(name, kind, state, pid, None if pid is None else 77)


def grant(id: str = "g1", region: str = "web", guest: str = "db", length: int = 4 * M, **more: object) -> Grant:
    """A grant that is mapped, of a region from its beginning."""
    made = Grant(id, region, guest, 0, length, Access.RW, GrantState.MAPPED)
    return msgspec.structs.replace(made, **more)


@dataclass
class Live:
    """A live guest: what it says, how it answers (``trouble`` is raised instead), and what it did, in order."""

    name: str
    kind: GuestKind = GuestKind.PROCESS
    pid: int = 4000
    start_ticks: int = 77
    says: GuestState = GuestState.RUNNING
    has_agent: bool = True
    maps: bool = True
    unmaps: bool = True
    trouble: MemconsoleError | None = None
    ram: str = ""
    obeys: bool = True
    did: list[str] = field(default_factory=list)

    def _do(self, what: str) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.did.append(what)

    def state(self) -> GuestState:
        if self.trouble is not None:
            raise self.trouble
        return self.says

    def agent(self) -> bool:
        return self.has_agent

    def offer(self, offer: Offer, within: float) -> bool:
        self._do(f"offer {offer.grant}")
        return self.maps

    def request_unmap(self, grant: str, within: float) -> bool:
        self._do(f"unmap {grant}")
        return self.unmaps

    def pause(self) -> None:
        self._do("pause")
        self.says = GuestState.PAUSED

    def resume(self) -> None:
        self._do("resume")
        self.says = GuestState.RUNNING

    def stop(self, within: float) -> None:
        self._do("stop")
        self.says = GuestState.GONE

    def kill(self) -> None:
        self.did.append("kill")
        self.says = GuestState.GONE

    def tell(self, number: signal.Signals) -> None:
        self._do(number.name)
        if self.obeys:
            self.says = GuestState.GONE

    def ends(self, within: float) -> bool:
        return self.says is GuestState.GONE

    def progress(self) -> Progress | None:
        return None

    def vcpus(self) -> tuple[Vcpu, ...] | None:
        return None

    def interrupt(self) -> None:
        self.did.append("interrupt")

    def close(self) -> None:
        self.did.append("close")


@dataclass
class Spaces:
    """What devices reach: each one's guest by BDF, the guests whose VMM fills its space, the grants that are mapped.

    ``quiesced``: the devices without the bus; ``did``: what was asked for, in order; ``fails``: what each request
    raises, by its name; ``trouble``: what all of them raise.
    """

    devices: dict[str, str] = field(default_factory=dict)
    vmm_filled: frozenset[str] = frozenset()
    mapped: set[str] = field(default_factory=set)
    trouble: MemconsoleError | None = None
    settled: int = 0
    quiesced: set[str] = field(default_factory=set)
    fails: dict[str, MemconsoleError] = field(default_factory=dict)
    did: list[str] = field(default_factory=list)

    def _do(self, what: str, of: str) -> None:
        trouble = self.fails.get(what, self.trouble)
        if trouble is not None:
            raise trouble
        self.did.append(f"{what} {of}")

    def _hush(self, bdf: str, quiet: bool) -> None:
        (self.quiesced.add if quiet else self.quiesced.discard)(bdf)

    def attach(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        self._do("attach", bdf)
        self.devices[bdf] = guest
        self._hush(bdf, quiet)

    def hand_device(self, guest: str, bdf: str, *, quiet: bool = False) -> None:
        self._do("hand", bdf)
        self.devices[bdf] = guest
        self.vmm_filled |= {guest}
        self._hush(bdf, quiet)

    def map(self, grant: Grant) -> None:
        self._do("map", grant.id)
        self.mapped.add(grant.id)

    def unmap(self, grant: Grant) -> None:
        self._do("unmap", grant.id)
        self.mapped.discard(grant.id)

    def quiesce(self, bdf: str) -> None:
        self._do("quiesce", bdf)
        self._hush(bdf, quiet=True)

    def restart(self, bdf: str) -> None:
        self._do("restart", bdf)
        self._hush(bdf, quiet=False)

    def close(self, guest: str) -> None:
        self._do("close", guest)
        self.devices = {bdf: owner for bdf, owner in self.devices.items() if owner != guest}

    @contextlib.contextmanager
    def borrowed_fds(self, bdf: str) -> Iterator[tuple[int, int]]:
        if bdf not in self.devices:
            raise NotFound(f"device {bdf} is not in custody", "", "")
        self._do("borrow", bdf)
        with Path(os.devnull).open("rb") as device, Path(os.devnull).open("rb") as space:
            yield device.fileno(), space.fileno()

    def reconcile(self) -> None:
        if "settle" in self.fails:
            raise self.fails["settle"]
        self.did.append("settle all")
        self.settled += 1

    def adopt(self) -> list[Finding]:
        return []


@dataclass
class Broker:
    """The userfaultfds that guests handed over: whose faults are served, whose are barred, and why none can be."""

    served: set[str] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)
    why: str = "its guest handed over no userfaultfd"

    def has_uffd(self, grant: str) -> bool:
        return grant in self.served

    def block_access(self, grant: str) -> str:
        if grant not in self.served:
            return self.why
        self.barred.add(grant)
        return ""

    def drop_uffd(self, grant: str) -> None:
        self.served.discard(grant)


@dataclass
class Mount:
    """The files of grants on a mount: which are barred, and which may be open unseen."""

    barred: set[str] = field(default_factory=set)
    open: dict[str, str] = field(default_factory=dict)
    synced: int = 0

    def sync(self) -> None:
        self.synced += 1

    def block_access(self, grant: Grant) -> None:
        self.barred.add(grant.id)

    def ram_path(self, guest: str, region: str) -> Path:
        return Path("/run/mount/guests") / guest / "ram" / region

    def file_path(self, path: str) -> Path:
        return Path("/run/mount/files") / path

    def why_open(self, grant: Grant) -> str:
        return self.open.get(grant.id, "")


@dataclass(frozen=True)
class Facts:
    """What is so on a desk.

    ``lost``: regions without memory. ``frames``: where every segment's pages lie, None where the kernel does not show
    it. ``mapping``: who maps the regions, by PID; ``reaching``: who has their descriptors, a look each (the last one
    stays); ``keeping``: who may have some out of sight. ``window_kept``: whether a guest keeps the window it is asked
    for. ``ram``: the blocks of strangers' RAM by PID, a memfd each, mapped at its ``hva``.
    """

    regions: tuple[Region, ...] = ()
    guests: tuple[Guest, ...] = ()
    grants: tuple[Grant, ...] = ()
    window_grants: tuple[WindowGrant, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()
    lost: frozenset[str] = frozenset()
    live: tuple[Live, ...] = ()
    agentless: frozenset[str] = frozenset()
    frames: tuple[Extent, ...] | None = None
    keeping: tuple[int, ...] = ()
    mapping: tuple[int, ...] = ()
    reaching: tuple[tuple[int, ...], ...] = ((),)
    unseen: str = ""
    strangers: tuple[Guest, ...] = ()
    ram: tuple[tuple[int, Sequence[Block]], ...] = ()
    windows: tuple[Window, ...] = ()
    window_gaps: tuple[Unread, ...] = ()
    window_kept: bool = False


class Desk(ForeignRam, Holdings):
    """A desk made of facts; ``root`` is a tree with as much memory as the tests want."""

    def __init__(self, directory: Path, facts: Facts = Facts()) -> None:
        tree = Tree(directory / "host")
        tree.meminfo()
        self.now = State()
        super().__init__(directory / "run", OwnCustody(), lambda: self.now, tree.root)
        self.tree = tree
        self.facts = facts
        self.exempt_processes = frozenset({os.getpid()})
        self.fuse_aliases: tuple[FuseAlias, ...] = ()
        self.blocked_mappings: tuple[BlockedMapping, ...] = ()
        self.standing: Callable[[], Sequence[Finding]] = tuple
        self.address_spaces = Spaces()
        self.userfaults = Broker()
        self.mount: Mount | None = None
        self.handoff: HandoffReport | None = None
        self.records: list[Record] = []
        self.withdrawn: list[str] = []
        self.looks = 0
        self.narrow = 0
        self.hold_ram(facts.ram)
        self._lives = {each.name: each for each in facts.live}
        regions = tuple(self._made(each) for each in facts.regions)
        self.change(
            StateChange(regions, facts.guests, facts.grants, facts.window_grants, facts.quarantine),
        )

    def _made(self, meant: Region) -> Region:
        """The region with memory of its own, held and in custody, unless it is lost."""
        if meant.name in self.facts.lost:
            return meant
        starts = range(0, meant.size, files.SEGMENT)
        sizes = [min(files.SEGMENT, meant.size - start) for start in starts]
        fds = tuple(memfd.fresh_segment(meant.name, index, size) for index, size in enumerate(sizes))
        made = msgspec.structs.replace(meant, segments=files.segments(fds))
        self.hold_region(meant.name, fds)
        for index, fd in enumerate(fds):
            self.custody.put(custody_name(meant.name, index), fd, msgspec.json.encode(made))
        return made

    # --- the ledger, which a test writes --------------------------------------------------------------------------

    def record(self, record: Record) -> int:
        """What control does with a record: fold it in; its number."""
        self.records.append(record)
        seq = len(self.records)
        self.now = self.now.apply_record(seq, record)
        return seq

    def carry(self, room: Recorded[T]) -> T:
        """What control does with a room that hands records up."""
        return carry(room, self.record)

    def change(self, change: StateChange) -> None:
        """Have the ledger mean something else."""
        self.now = self.now.apply_record(0, EventRecord(0, "set", "", "", change=change))
        self.now.events.clear()

    # --- who reaches what -----------------------------------------------------------------------------------------

    def region_reach(
        self, region: Region, segment: int | None = None, among: Collection[int] | None = None
    ) -> RegionReach:
        if among is not None:
            self.narrow += 1
        pids = self.facts.reaching[min(self.looks, len(self.facts.reaching) - 1)]
        self.looks += 1
        mapped = tuple(RegionMapping(region.name, pid, _vma(region), 0) for pid in self.facts.mapping)
        return RegionReach(mapped, tuple((pid, 3) for pid in pids), self.facts.unseen)

    def keepers(self, among: Collection[int] | None = None) -> tuple[int, ...]:
        return self.facts.keeping if among is None else ()

    def segment_frames(self, region: str, segment: int) -> ExtentTable:
        self.fds(region)
        if self.facts.frames is None:
            raise Denied("/proc/self/pagemap", "frames are shown to CAP_SYS_ADMIN only")
        return ExtentTable.from_rows(self.facts.frames)

    def windows(self, gaps: list[Unread]) -> tuple[Window, ...]:
        gaps += self.facts.window_gaps
        return self.facts.windows

    def reaches_window(self, guest: Guest, window: Window) -> bool:
        return self.facts.window_kept

    # --- guests ---------------------------------------------------------------------------------------------------

    def directory(self, guest: str) -> Path:
        return self.runtime_dir / "vmm" / guest

    def live_guest(self, guest: str) -> Live | None:
        return self._lives.get(guest)

    def lives(self, guest: str) -> Live:
        """A guest that is live."""
        return self._lives[guest]

    def guest_replies(self, deadline: float) -> Mapping[str, GuestReply]:
        return {name: GuestReply(live.says) for name, live in self._lives.items()}

    def state_of(self, live: GuestDriver) -> GuestState:
        return live.state()

    def connected(self, guest: str, *, patient: bool = True) -> bool:
        live = self.live_guest(guest)
        return live is not None and live.kind is not GuestKind.QEMU and live.has_agent

    def remove_guest(self, guest: str) -> None:
        live = self._lives.pop(guest, None)
        if live is not None:
            live.close()

    def add_guest(self, live: Live) -> None:
        self._lives[live.name] = live

    def start_guest(self, guest: Guest, grant: Grant, args: tuple[str, ...]) -> Live:
        live = Live(guest.name, guest.kind, pid=5000)
        self.add_guest(live)
        return live

    def attach_guest(self, name: str, pid: int) -> Live:
        live = Live(name, pid=pid)
        self.add_guest(live)
        return live

    def adopt_guest(self, guest: Guest, *, windows: bool = True) -> Live:
        if guest.pid is None:
            raise Gone(f"guest {guest.name} is gone", "its process ended", "")
        live = Live(guest.name, guest.kind, guest.pid, guest.start_ticks or 0)
        self.add_guest(live)
        return live

    def foreign_guests(self) -> tuple[Guest, ...]:
        return self.facts.strangers

    # --- offers ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def grant_offer(self, grant: Grant) -> Iterator[Offer]:
        index, offset = divmod(grant.offset, files.SEGMENT)
        yield Offer(grant.id, self.fds(grant.region)[index], offset, grant.length, grant.access, grant.gpa)

    @contextlib.contextmanager
    def window_offer(self, grant: WindowGrant) -> Iterator[Offer]:
        window = next((each for each in self.facts.windows if each.id == grant.window), None)
        if window is None:
            raise NotFound(f"window {grant.window} is gone", "", "")
        yield Offer(grant.id, -1, 0, window.size, Access.RW, None, window=True)

    def withdraw(self, grant: Grant | WindowGrant) -> None:
        self.withdrawn.append(grant.id)


def _vma(region: Region) -> Vma:
    """All of a region's first segment in one shared mapping."""
    segment = region.segments[0]
    return Vma(1 << 32, (1 << 32) + region.size, "rw-s", 0, segment.device, segment.inode, "", deleted=False)


@contextlib.contextmanager
def desk_of(directory: Path, facts: Facts) -> Iterator[Desk]:
    """A desk of these facts, its memory and custody closed in the end."""
    desk = Desk(directory, facts)
    try:
        yield desk
    finally:
        desk.close_ram()
        desk.close()
        desk.custody.close()


def _spelled_out(facts: Callable[P, Facts]) -> Callable[Concatenate[Path, P], contextlib.AbstractContextManager[Desk]]:
    def desks(directory: Path, /, *args: P.args, **kwargs: P.kwargs) -> contextlib.AbstractContextManager[Desk]:
        return desk_of(directory, facts(*args, **kwargs))

    return desks


desks = _spelled_out(Facts)
"""The same, of facts that are spelled out."""
