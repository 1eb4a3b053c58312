"""A handoff on a desk that is a value: custody that survives, live update and memconsole-resume played by plain data.

What a step does to memory is real (memfds of this process); what it would do to the kernel is written down in
:class:`Played`, which fails where a test says so. :meth:`Desk.resumed` is what the next kernel finds in custody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import msgspec

from memconsole.actions import HandoffAction, HandoffRehearse, HandoffRun
from memconsole.backend.custody.holder import OwnCustody
from memconsole.backend.guests.base import Restart
from memconsole.backend.handoff import bootplan, facts, manifest
from memconsole.backend.handoff.bootplan import Mismatch, Resume, Resumed, ResumePhase
from memconsole.backend.handoff.image import KernelImage
from memconsole.errors import Gone, KernelRefused, MemconsoleError
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.model import Finding, Guest, GuestKind, GuestState, Range, Survival
from support import desks
from support.desks import M, grant, region

PAGE = 4096
BDF = "0000:00:04.0"


def refused(what: str = "it") -> KernelRefused:
    """What a kernel says that will not."""
    return KernelRefused("ioctl", 5, what=f"{what} cannot be done")


class Kept(OwnCustody):
    """Custody as a keeper has it: it survives. ``jumped`` is what it held when it made the jump."""

    label = "keeper, pid 7"
    survives = True
    resumes = True

    def __init__(self) -> None:
        super().__init__()
        self.jumped: list[str] | None = None
        self.stays: MemconsoleError | None = None
        self.fails: dict[str, MemconsoleError] = {}

    def put(self, name: str, fd: int, payload: bytes = b"") -> None:
        if name in self.fails:
            raise self.fails[name]
        super().put(name, fd, payload)

    def jump(self) -> None:
        if self.stays is not None:
            raise self.stays
        self.jumped = self.names()

    def payload(self, name: str) -> bytes:
        """What is said of one fd."""
        fd, payload = self.get(name)
        os.close(fd)
        return payload


@dataclass
class Vmm(desks.Live):
    """A live VM: ``fails`` is what it raises when it is to do something, by name; ``away`` what it says it missed."""

    kind: GuestKind = GuestKind.CANARY
    ram: str = "g1"
    saved: bool = False
    shares_ram: bool = True
    vfio: bool = False
    away: tuple[int, int] = (1, 5_000_000)
    channel: Path | None = None
    fails: dict[str, MemconsoleError] = field(default_factory=dict)

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise self.fails[what]
        super()._do(what)

    def pause(self) -> None:
        self._do("pause")
        if self.says is not GuestState.SUSPENDED:
            self.says = GuestState.PAUSED

    def save(self, fd: int, within: float) -> None:
        self._do("save")
        os.write(fd, f"state of {self.name}".encode())
        self.says, self.saved = GuestState.PAUSED, True

    def await_answer(self, within: float) -> None:
        self._do("answer")

    def quit(self, within: float) -> None:
        self._do("quit")
        self.says = GuestState.GONE

    def is_saved(self) -> bool:
        return self.saved

    def shares(self) -> bool:
        return self.shares_ram

    def passes_through(self) -> bool:
        return self.vfio

    def restart(self, state: str, ram: str, *, paused: bool = False) -> Restart:
        last = () if paused else (("cont", "return"),)
        return Restart(("qemu-system-x86_64",), ((ram, 3), (state, 4)), "/run/qmp", (("status", "paused"), *last))

    def blackout(self) -> tuple[int, int]:
        self._do("blackout")
        return self.away

    def agent_channel(self) -> Path | None:
        self._do("channel")
        return self.channel

    def clocks(self) -> tuple[str, ...]:
        self._do("clocks")
        return ("kvmclock",)


class Broker(desks.Broker):
    """The userfaultfds, as a start takes them over."""

    def adopt(self) -> list[Finding]:
        return []

    def forget_ended(self) -> None:
        """None of them is anybody's any more."""


class Session:
    """A session of live update: what it preserved, by token; its file is a memfd."""

    def __init__(self, played: Played, name: str, fd: int | None = None) -> None:
        self.name = name
        self.fd = os.memfd_create(name) if fd is None else fd
        self._played = played
        played.preserved.setdefault(name, {})

    def preserve(self, fd: int, token: int) -> None:
        self._played.do("preserve", self.name)
        self._played.preserved[self.name][token] = os.fstat(fd).st_ino

    def finish(self) -> None:
        self._played.do("finish", self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)


@dataclass
class Played:
    """Live update and memconsole-resume: what they were asked for in order, and what they refuse (``fails``).

    ``stuck``: guests that do not come back; ``waiting``: what those that come back say, by name, else that they run.
    """

    desk: Desk
    did: list[str] = field(default_factory=list)
    preserved: dict[str, dict[int, int]] = field(default_factory=dict)
    fails: dict[str, MemconsoleError] = field(default_factory=dict)
    stuck: frozenset[str] = frozenset()
    findings: tuple[Mismatch, ...] = ()

    def do(self, what: str, of: str = "") -> None:
        """Write one request down, or refuse it."""
        if what in self.fails:
            raise self.fails[what]
        self.did.append(f"{what} {of}".strip())

    def create(self, session: str) -> Session:
        self.do("create", session)
        return Session(self, session)

    def adopt(self, fd: int) -> Session:
        self.do("adopt")
        return Session(self, "adopted", fd)

    def load(self, kernel: str, initrd: str | None, line: str) -> None:
        self.do("load", kernel)

    def unload(self) -> None:
        self.do("unload")

    def revive(self, runtime_dir: Path, plan: str) -> None:
        self.do("revive", plan)
        fd, _ = self.desk.custody.get(plan)
        try:
            planned = bootplan.decode(manifest.content(fd))
        finally:
            os.close(fd)
        self.desk.resumed([each.guest for each in planned.starts], stuck=self.stuck, findings=self.findings)


class Desk(desks.Desk):
    """A desk for a handoff: ``frames``: where each region's pages begin (PFN); ``on_return``: what guests say then."""

    custody: Kept
    address_spaces: desks.Spaces
    userfaults: Broker

    def __init__(self, directory: Path, facts: desks.Facts) -> None:
        self.frames: dict[str, int] = {}
        self.on_return: dict[str, GuestState] = {}
        self.dead: set[int] = set()
        super().__init__(directory, facts)
        held, self.custody = self.custody, Kept()
        for name in held.names():
            fd, payload = held.get(name)
            self.custody.put(name, fd, payload)
            os.close(fd)
        held.close()
        self.address_spaces, self.userfaults = desks.Spaces(), Broker()
        self.tree.host()
        self.tree.directory("/proc")
        self.runtime_dir.mkdir(parents=True, exist_ok=True)
        ledger = manifest.memfd("ledger", b"ledger")
        self.custody.put("ledger", ledger)
        os.close(ledger)

    def segment_frames(self, region: str, segment: int) -> ExtentTable:
        self.fds(region)
        size = self.state.regions[region].segments[segment].size
        base = self.frames.setdefault(region, 0x1000 + 0x100000 * len(self.frames))
        return ExtentTable.from_rows([Extent(0, base, size // PAGE, Flag.PRESENT | Flag.HUGE)])

    def remove_guest(self, guest: str) -> None:
        live = self.live_guest(guest)
        if live is not None and live.says is GuestState.GONE:
            self.dead.add(live.pid)
        super().remove_guest(guest)

    def adopt_guest(self, guest: Guest, *, windows: bool = True) -> Vmm:
        if guest.pid is None or guest.pid in self.dead:
            raise Gone(f"guest {guest.name} is gone", "its process ended", "")
        before = self._lives.get(guest.name)
        if isinstance(before, Vmm) and before.pid == guest.pid:
            return before
        says = self.on_return.get(guest.name, GuestState.RUNNING)
        live = Vmm(guest.name, guest.kind, guest.pid, guest.start_ticks or 0, says)
        self.add_guest(live)
        return live

    def lives(self, guest: str) -> Vmm:
        """A VM that is live."""
        live = super().lives(guest)
        assert isinstance(live, Vmm)
        return live

    def content(self, name: str) -> bytes:
        """What a memfd in custody holds."""
        fd, _ = self.custody.get(name)
        try:
            return manifest.content(fd).rstrip(b"\0")
        finally:
            os.close(fd)

    def keep(self, name: str, content: bytes = b"", payload: bytes = b"") -> None:
        """Put a memfd into custody."""
        fd = manifest.memfd(name.replace(":", "-"), content)
        self.custody.put(name, fd, payload)
        os.close(fd)

    def resumed(
        self,
        guests: Sequence[str],
        *,
        stuck: frozenset[str] = frozenset(),
        findings: tuple[Mismatch, ...] = (),
        mode: str = "rehearse",
    ) -> None:
        """Custody as memconsole-resume leaves it: guests are other processes, and the record says so."""
        now = bootplan.moment()
        back = tuple(
            Resumed(name, "held", why="its state cannot be read", at=now)
            if name in stuck
            else Resumed(name, "started", 6000 + row, 99, at=now)
            for row, name in enumerate(guests)
        )
        for each in back:
            if each.state != "held":
                self.keep(bootplan.STARTED + each.guest)
        phases = tuple(ResumePhase(name, now) for name in ("keeper", "planned", "verified", "started", "finished"))
        record = Resume(bootplan.RESUME_VERSION, mode, phases, back, tuple(self.custody.names()), findings)
        self.keep(bootplan.RESUME, msgspec.json.encode(record))


def vm(name: str, kind: GuestKind = GuestKind.CANARY, pid: int = 4001, **more: object) -> Guest:
    """A VM of the ledger."""
    return msgspec.structs.replace(Guest(name, kind, GuestState.RUNNING, pid, 77, memory=4 * M), **more)


@contextlib.contextmanager
def two_guests(directory: Path, **facts: Any) -> Iterator[Desk]:
    """A desk with a canary and a QEMU that run, each on a region of its own, and a region of nobody's."""
    made: dict[str, Any] = {
        "regions": (region("web"), region("vm"), region("old")),
        "guests": (vm("web"), vm("vm", GuestKind.QEMU, 4002)),
        "grants": (grant("g1", "web", "web", gpa=0), grant("g2", "vm", "vm", gpa=0)),
        "live": (Vmm("web", pid=4001), Vmm("vm", GuestKind.QEMU, 4002, ram="g2")),
    }
    desk = Desk(directory, replace(desks.Facts(), **made | facts))
    try:
        yield desk
    finally:
        desk.close()
        desk.custody.close()


LINE = "console=ttyS0 kho=on liveupdate=on"
MODULES = ("vfio_pci", "iommufd")
IMAGE = KernelImage("/boot/vmlinuz", 12 * M, "7.3.5", "zstd", 2 * M, 24 * M, facts.ABIS, "", MODULES, "#5 SMP")
SURVIVAL = Survival(kho=True, luo=True, kho_cmdline=True, luo_cmdline=True, scratch=(Range(0, 512 * M, "s"),))


def seen(desk: Desk, played: Played, action: HandoffAction) -> facts.HandoffFacts:
    """What is seen of a desk whose host has live update, and a next kernel that suits it."""
    found = facts.gather_facts(desk, HandoffRehearse(), played, jump=False)
    # the files that stand for devices answer no ioctl of VFIO
    devices = tuple(replace(each, restless="") for each in found.devices)
    if not isinstance(action, HandoffRun):
        return replace(found, devices=devices)
    devices = tuple(replace(each, unpreserved="PRESERVE_FD of its iommufd: ENOENT") for each in devices)
    kept = () if action.finish else facts.unfinished_sessions(desk)
    return into_next_kernel(replace(found, survival=SURVIVAL, devices=devices, kept=kept), LINE)


def into_next_kernel(found: facts.HandoffFacts, line: str) -> facts.HandoffFacts:
    """The same facts before a jump into a next kernel that suits this host, with the command line that this one has."""
    return replace(
        found,
        jump=True,
        kernel=IMAGE.path,
        image=IMAGE,
        initrd="/boot/initrd.img",
        initrd_size=20 * M,
        line=line,
        here=line,
    )


BOOT = "00000000-next-boot"
"""What the kernel behind the jump calls its boot."""


def next_kernel(desk: Desk) -> None:
    """Be in the next kernel: who lived is gone, custody has what was to be held."""
    plan = bootplan.decode(desk.content(bootplan.MANIFEST))
    for name in desk.custody.names():
        if name not in {bootplan.MANIFEST, *(each.name for each in plan.holds)}:
            desk.custody.drop(name)
    for name in list(desk.state.guests):
        desk.remove_guest(name)
    desk.address_spaces = desks.Spaces()
    desk.handoff = None
    desk.tree.write("/proc/sys/kernel/random/boot_id", f"{BOOT}\n")
