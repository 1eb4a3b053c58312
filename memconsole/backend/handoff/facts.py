"""What a handoff is checked against: host, next kernel, regions and guests in one picture, before anything is done.

command line     /proc/cmdline, and the one the next kernel is to get
image            setup header and ABI words of the kernel's file (image.py)
ABI words        of this kernel: /sys/kernel/debug/kho/{out,in}/fdt, out/sub_fdts/LUO; else those this memconsole knows
memory limit     of this process's cgroup and of those above it (cgroup.py)
sessions         fd links ``anon_inode:[luo_session] NAME`` of other processes
folios           the PFN maps of the regions
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msgspec.structs import replace

from memconsole.actions import NO_INITRD, HandoffAction, HandoffRun
from memconsole.backend import needs, own_findings
from memconsole.backend.custody import manager
from memconsole.backend.custody.manager import UnitFdStore
from memconsole.backend.guests.base import is_qemu
from memconsole.backend.handoff import (
    adopted_facts,
    apart,
    bootfiles,
    carried,
    device_facts,
    facets,
    luo,
    roads,
    save_restore,
)
from memconsole.backend.handoff import image as images
from memconsole.backend.handoff.bootplan import INCOMING
from memconsole.backend.handoff.device_facts import DeviceFacts
from memconsole.backend.handoff.image import KernelImage
from memconsole.backend.handoff.powers import Powers
from memconsole.backend.kernel import census, cgroup, kho, tree
from memconsole.backend.kernel.handover import abi, outgoing
from memconsole.backend.kernel.memory import memory as read_memory
from memconsole.backend.managers import libvirt_setup
from memconsole.backend.observe import paging
from memconsole.backend.observe.mappings import RegionMapping, region_mappings, stray_mappings
from memconsole.backend.observe.survey import GuestReply, foreign_guests
from memconsole.backend.peers.asked import PATIENCE_S
from memconsole.backend.stores import adopted
from memconsole.errors import BadFile, MemconsoleError, NotFound
from memconsole.extents import Flag
from memconsole.model import Finding, Grant, Guest, GuestKind, GuestState, Memory, Range, Region, Survival
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.backend.ledger.state import State

ABIS = ("kho-v4", "luo-v5", "memfd-v2")
"""What the layouts of KHO, LUO and its memfds are called in the kernels this memconsole knows."""
_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class RegionFacts:
    """A region that is to be carried: what of it is resident, and how its frames lie (bytes, runs of frames).

    ``loose`` are bytes in base pages, ``in_scratch`` bytes in KHO's scratch, from which preserving moves them away.
    """

    region: Region
    resident: int
    runs: int = 0
    loose: int = 0
    in_scratch: int = 0


@dataclass(frozen=True)
class GuestFacts:
    """A guest that is to be carried: its state, and what of a VMM's answer speaks against it.

    ``kept``: what keeps an adopted guest from being carried, each in words. ``stays``: it is left as it is, for its VMM
    has devices in its hands and this is a rehearsal. ``agentless``: it is a QEMU without a channel for the guest agent,
    which would set its clock. ``slow``: what keeps an adopted guest that is carried from the fast lane, likewise.
    """

    guest: Guest
    state: GuestState
    why_not: str = ""
    incapable: str = ""
    stays: bool = False
    agentless: bool = False
    kept: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()

    @property
    def is_carried(self) -> bool:
        """Whether it is an adopted guest that comes along."""
        return self.guest.adopted and self.state is not GuestState.GONE and not self.kept

    @property
    def is_left(self) -> bool:
        """Whether it is an adopted guest that a rehearsal leaves as it is: its RAM changes meanwhile."""
        return self.guest.adopted and self.state is not GuestState.GONE and bool(self.kept)


@dataclass(frozen=True)
class HandoffFacts:
    """All of it; ``jump``: whether a kernel is to be booted, or the handoff only rehearsed.

    ``road``: where the manifest and the guests' state are left for the next kernel; empty where live update carries
    them. ``room``: how many of its bytes that takes, and how many are free. ``arenas``: their names, and where they
    begin.
    """

    jump: bool
    survival: Survival
    memory: Memory
    kernel: str = ""
    initrd: str = ""
    bare: bool = False
    image: KernelImage | None = None
    image_why: str = ""
    running: str = ""
    initrd_size: int = 0
    initrd_why: str = ""
    line: str = ""
    here: str = ""
    abis: tuple[str, ...] = ABIS
    kexec_disabled: bool = False
    loaded: bool = False
    limit: tuple[str, int] | None = None
    limit_why: str = ""
    regions: tuple[RegionFacts, ...] = ()
    lost: tuple[str, ...] = ()
    stranded: tuple[tuple[str, str], ...] = ()
    road: str = ""
    arenas: tuple[tuple[str, int], ...] = ()
    room: tuple[int, int] = (0, 0)
    guests: tuple[GuestFacts, ...] = ()
    strangers: tuple[Guest, ...] = ()
    sessions: tuple[tuple[int, str], ...] = ()
    opener: int | None = None
    custody: str = ""
    survives: bool = True
    devices: tuple[DeviceFacts, ...] = ()
    missing: tuple[str, ...] | None = ()
    lazy: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    users: tuple[tuple[int, str], ...] = ()
    doubts: tuple[Finding, ...] = ()
    stores: tuple[UnitFdStore, ...] = ()
    stores_why: str = ""
    misplaced: tuple[tuple[str, str], ...] = ()
    libvirt: tuple[libvirt_setup.Part, ...] = ()
    named: tuple[str, ...] = ()

    @property
    def next_kernel(self) -> str:
        """The kernel that would be booted, by release and version; empty where its image could not be read."""
        return f"{self.image.release} {self.image.version}".rstrip() if self.image is not None else ""

    @property
    def runs_already(self) -> bool:
        """Whether the kernel that would be booted is known to be the one that runs."""
        return self.running != "" and self.running == self.next_kernel


@dataclass(frozen=True)
class BootTarget:
    """What is to be booted: paths and the whole command line; a path that could not be found is empty.

    ``bare``: it was said that this kernel needs no initrd.
    """

    kernel: str
    initrd: str
    line: str
    bare: bool = False


def boot_target(action: HandoffAction, root: tree.Root = "/") -> BootTarget:
    """The kernel an action means: what it names, else what this host boots by itself, and this kernel's command line.

    An initrd that is not named is the one that belongs to the kernel.
    """
    line = action.append or tree.line(root, "/proc/cmdline")
    bare = action.initrd == NO_INITRD
    named = "" if bare else action.initrd
    if action.kernel:
        beside = bootfiles.initrd_of(os.path.abspath(action.kernel))  # noqa: PTH100 - links are followed when it is opened
        return BootTarget(action.kernel, "" if bare else named or beside, line, bare)
    found = bootfiles.default(root)
    kernel, initrd = (tree.below(root, path) if path else "" for path in found)
    return BootTarget(kernel, "" if bare else named or initrd, line, bare)


def gather_facts(desk: facets.HandoffChecks, action: HandoffAction, powers: Powers, *, jump: bool) -> HandoffFacts:
    """Look at everything a handoff may fail at; nothing is changed.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: this host's memory or command line cannot be read.
    """
    root, state = desk.root, desk.state
    survival = kho.survival(root)
    seen = census.take(root, closed=desk.exempt_processes)
    overs = region_mappings(seen, state.regions.values(), desk.fuse_aliases, desk.blocked_mappings)
    facts: dict[str, object] = {}
    if jump:
        facts = _of_the_jump(action, root) | _limits(root)
        facts |= roads.facts_of(desk, survival, str(facts["line"]))
        facts["sessions"] = tuple(
            (pid, session.name) for session in outgoing.sessions(seen, root) for pid in session.holders
        )
        if not (isinstance(action, HandoffRun) and action.finish):
            facts["kept"] = unfinished_sessions(desk)
        facts["users"] = tuple(sorted({(over.pid, over.region) for over in stray_mappings(state, overs, seen)}))
        facts |= _stores(root)
        facts["opener"] = next((each.pid for each in seen.processes.values() if each.holds(luo.DEVICE)), None)
    target_image = facts.get("image")
    image = target_image if isinstance(target_image, KernelImage) else None
    answers = desk.guest_replies(time.monotonic() + PATIENCE_S)
    strangers = foreign_guests(seen, state)
    found = device_facts.gather_devices(desk, image, str(facts.get("line", "")), powers, jump=jump)
    kept = adopted_facts.kept(desk, [guest for guest in state.guests.values() if guest.adopted])
    lacks = _libvirt((*strangers, *state.guests.values()), root)
    guests = tuple(_guest_facts(desk, guest, answers, overs, jump=jump) for guest in state.guests.values())
    guests = tuple(dataclasses.replace(met, kept=kept.get(met.guest.name, ())) for met in guests)
    return HandoffFacts(
        jump=jump,
        survival=survival,
        memory=read_memory(root),
        regions=tuple(
            _region_facts(desk, region, survival.scratch)
            for region in state.regions.values()
            if desk.holds_region(region.name) and desk.store_of(region.name).CARRIED
        ),
        stranded=roads.stranded(desk),
        lost=tuple(name for name in state.regions if not desk.holds_region(name)),
        guests=tuple(_in_its_lane(desk, met, lacks, jump=jump) for met in guests),
        strangers=strangers,
        libvirt=lacks,
        doubts=(*desk.standing(), *own_findings.custody_findings(desk), *own_findings.waiting_guests(desk)),
        misplaced=_misplaced(state, overs),
        named=_named(desk, kept),
        custody=desk.custody.label,
        survives=desk.custody.survives,
        devices=found,
        missing=device_facts.missing_modules(image, root) if jump and found else (),
        lazy=tuple(
            (grant.id, grant.guest) for grant in state.grants.values() if grant.lazy and _ends(state, grant, jump)
        ),
        **facts,  # type: ignore[arg-type]  # the fields of Facts that _of_the_jump names
    )


def _in_its_lane(
    desk: facets.HandoffChecks, met: GuestFacts, lacks: tuple[libvirt_setup.Part, ...], *, jump: bool
) -> GuestFacts:
    if not met.is_carried:
        return met
    if not jump:
        return dataclasses.replace(met, slow=(carried.REHEARSED,))
    return dataclasses.replace(met, slow=carried.slow(desk, met.guest, lacks))


def _limits(root: tree.Root) -> dict[str, object]:
    try:
        return {"limit": _limit(root)}
    except tree.UNREADABLE as error:
        return {"limit_why": f"{error.what}: {error.why}" if error.why else error.what}


def _libvirt(guests: Iterable[Guest], root: tree.Root) -> tuple[libvirt_setup.Part, ...]:
    """What libvirt lacks for its guests to go along, where it has any."""
    if not any(guest.managed is not None and guest.managed.user is None for guest in guests):
        return ()
    try:
        return tuple(libvirt_setup.lacking(libvirt_setup.status(root)))
    except tree.UNREADABLE as error:
        return (libvirt_setup.unknown(error),)


def unfinished_sessions(desk: needs.InCustody) -> tuple[str, ...]:
    """The sessions of the kernel before that were not finished, as custody calls them."""
    return tuple(name for name in desk.custody.names() if name.startswith(INCOMING))


def _of_the_jump(action: HandoffAction, root: tree.Root) -> dict[str, object]:
    aim = boot_target(action, root)
    found: dict[str, object] = {
        "kernel": aim.kernel,
        "running": _running(root),
        "initrd": aim.initrd,
        "bare": aim.bare,
        "line": aim.line,
        "here": tree.line(root, "/proc/cmdline"),
        "abis": _abis(root),
        "kexec_disabled": _number(root, "/proc/sys/kernel/kexec_load_disabled") == 1,
        "loaded": images.loaded(root),
    }
    try:
        if not aim.kernel:
            raise NotFound("no kernel image found in /boot", "none was named", "pass --kernel FILE")
        found["image"] = _inspected(aim.kernel)
    except MemconsoleError as error:
        found["image_why"] = str(error)
    try:
        found["initrd_size"] = _size(aim.initrd) if aim.initrd else 0
    except MemconsoleError as error:
        found["initrd_why"] = str(error)
    return found


def _running(root: tree.Root) -> str:
    """The kernel that runs, as :attr:`HandoffFacts.next_kernel` has the next one; empty where this host shows none."""
    try:
        return " ".join(tree.line(root, f"/proc/sys/kernel/{name}") for name in ("osrelease", "version"))
    except NotFound:
        return ""


def _size(path: str) -> int:
    fd = images.opened(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _inspected(path: str) -> KernelImage:
    """The image at a path; unpacking takes a second, and is done once for the same file, whoever asks meanwhile.

    What is wrong with a file is remembered like what is in it: to ask again costs nothing. That it took too long is
    not: another time it may not.
    """
    fd = images.opened(path)
    try:
        about = os.fstat(fd)
        identity = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
        with _unpacking:
            found = _unpacked.pop(identity, None) or _looked_at(path, fd)
            _unpacked[identity] = found
            while len(_unpacked) > _UNPACKED_KEPT:
                del _unpacked[next(iter(_unpacked))]
    finally:
        os.close(fd)
    if isinstance(found, BadFile):
        raise BadFile(found.what, found.why, found.remedy)
    return replace(found, path=path)


def _looked_at(path: str, fd: int) -> KernelImage | BadFile:
    try:
        return apart.inspect(path, fd)
    except apart.TooSlow:
        raise
    except BadFile as error:
        return error


_UNPACKED_KEPT = 8
_unpacking = threading.Lock()
_unpacked: dict[tuple[int, ...], KernelImage | BadFile] = {}
"""What the last files that were looked at are, by device, inode, size and times."""


def _stores(root: tree.Root) -> dict[str, object]:
    """The fd stores of other units that are to outlive their unit; the jump passes by who would carry them."""
    if not manager.manages(root):
        return {}
    try:
        return {"stores": manager.stores(but=(manager.own_unit(root),))}
    except (OSError, subprocess.SubprocessError) as error:
        return {"stores_why": f"the units that use the fd store are unknown: {error}"}


def _number(root: tree.Root, path: str) -> int:
    try:
        return tree.number(root, path)
    except NotFound:
        return 0


def _abis(root: tree.Root) -> tuple[str, ...]:
    """The ABI words this kernel speaks: those it shows of a family count, else those that are known here."""
    shown: dict[str, tuple[str, ...]] = {}
    for name in ("out/fdt", "in/fdt", "out/sub_fdts/LUO"):
        try:
            found = abi.words(tree.read(root, f"{kho.DEBUGFS}/kho/{name}"))
        except tree.UNREADABLE:
            continue
        for word in found:
            family = abi.family(word)
            shown.setdefault(family, tuple(each for each in found if abi.family(each) == family))
    return tuple(word for known in ABIS for word in shown.get(abi.family(known), (known,)))


def _limit(root: tree.Root) -> tuple[str, int] | None:
    """The tightest memory limit over this process, with its cgroup; None where there is none.

    Raises:
        As :func:`cgroup.memory_limit`: whether there is one is not known.
    """
    found = cgroup.memory_limit(root)
    return (found.cgroup, found.size) if found is not None else None


def _region_facts(desk: needs.RegionFrames, region: Region, scratch: tuple[Range, ...]) -> RegionFacts:
    runs = loose = in_scratch = resident = 0
    for index in range(len(region.segments)):
        with desk.segment_frames(region.name, index) as table:
            stats = table.stats()
            runs += stats.runs
            resident += stats.present * PAGE
            for row in table:
                if not row.flags & Flag.HUGE:
                    loose += row.count * PAGE
                in_scratch += sum(_overlap(row.pfn * PAGE, (row.pfn + row.count) * PAGE, each) for each in scratch)
    return RegionFacts(region, resident, runs, loose, in_scratch)


def _misplaced(state: State, overs: Sequence[RegionMapping]) -> tuple[tuple[str, str], ...]:
    """The guests that map a region where the kernel can map it by base pages only, each with that region."""
    names = {guest.pid: guest.name for guest in state.guests.values()}
    return tuple(
        sorted(
            {
                (names[over.pid], over.region)
                for over in overs
                if over.pid in names
                and over.vma.size > paging.WORTH
                and state.regions[over.region].page_size == PAGE
                and paging.misplaced(over.vma.start, over.vma.offset)
            }
        )
    )


def _named(desk: needs.RegionFds, kept: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The regions that are RAM another program made, as a file that still has its name; a guest that comes along loses
    it on the way.
    """
    loses = {grant.region for grant in desk.state.grants.values() if kept.get(grant.guest) == ()}
    mine = [each.name for each in desk.state.regions.values() if each.store == adopted.NAME and each.name not in loses]
    return tuple(name for name in mine if desk.holds_region(name) and any(map(adopted.has_name, desk.fds(name))))


def _overlap(start: int, end: int, range: Range) -> int:
    return max(0, min(end, range.end) - max(start, range.start))


def _ends(state: State, grant: Grant, jump: bool) -> bool:
    """Whether a grant's process ends in this handoff."""
    guest = state.guests.get(grant.guest)
    return jump or guest is None or guest.kind not in {GuestKind.PROCESS, GuestKind.FOREIGN}


def _user_facts(state: State, guest: Guest, overs: Sequence[RegionMapping]) -> GuestFacts:
    """A user runs while any process maps one of the files: none of them is known, and so told."""
    files = {grant.region for grant in state.grants_of(guest=guest.name)}
    mapped = any(over.region in files for over in overs)
    return GuestFacts(guest, GuestState.RUNNING if mapped else GuestState.GONE)


def _guest_facts(
    desk: facets.HandoffChecks,
    guest: Guest,
    answers: Mapping[str, GuestReply],
    overs: Sequence[RegionMapping],
    *,
    jump: bool,
) -> GuestFacts:
    """A guest as it answered, when all were asked at once; one that is silent is asked nothing more."""
    if guest.is_user:
        return _user_facts(desk.state, guest, overs)
    answer = answers.get(guest.name)
    live = desk.live_guest(guest.name)
    if live is None or answer is None:
        return GuestFacts(guest, GuestState.GONE)
    if answer.state is GuestState.SILENT:
        return GuestFacts(guest, answer.state, why_not=answer.why)
    stays = not jump and guest.name in desk.address_spaces.vmm_filled
    asked = guest.kind in {GuestKind.CANARY, GuestKind.QEMU} and not stays
    try:
        incapable = save_restore.why_not_savable(desk, live) if asked and answer.state is not GuestState.GONE else ""
        agentless = asked and is_qemu(live) and live.agent_channel() is None
    except MemconsoleError as error:
        return GuestFacts(guest, GuestState.SILENT, why_not=str(error))
    return GuestFacts(guest, answer.state, incapable=incapable, stays=stays, agentless=agentless)
