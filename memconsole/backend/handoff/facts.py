"""What a handoff is checked against: host, next kernel, regions and guests in one picture, before anything is done.

command line     /proc/cmdline, and the one the next kernel is to get
image            setup header and ABI strings of the kernel's file (image.py)
ABI strings      of this kernel: /sys/kernel/debug/kho/{out,in}/fdt, out/sub_fdts/LUO; else those this memconsole knows
memory.max       of this process's cgroup and of those above it (/sys/fs/cgroup)
sessions         fd links ``anon_inode:[luo_session] NAME`` of other processes
folios           the PFN maps of the regions
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from memconsole.actions import Handoff, HandoffRun
from memconsole.backend.handoff import image as images
from memconsole.backend.handoff import luo, passed, vmm
from memconsole.backend.handoff.bootplan import INCOMING
from memconsole.backend.handoff.image import Image
from memconsole.backend.handoff.passed import Passed
from memconsole.backend.kernel import census, kho, tree
from memconsole.backend.kernel.handover import outgoing
from memconsole.backend.kernel.memory import memory as read_memory
from memconsole.backend.survey import foreign, mappings, strays
from memconsole.errors import GuestError, MemconsoleError, NotFound
from memconsole.extents import ExtentTable, Flag
from memconsole.model import Grant, Guest, GuestKind, GuestState, Memory, Range, Region, Survival
from memconsole.units import PAGE

if TYPE_CHECKING:
    from memconsole.backend.desk import Desk
    from memconsole.backend.guests.base import Guest as LiveGuest
    from memconsole.backend.state import State

ABIS = ("kho-v4", "luo-v5", "memfd-v2")
"""What the layouts of KHO, LUO and its memfds are called in the kernels this memconsole knows."""
_ABI = re.compile(rb"(kho|luo)-v\d+")
_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Held:
    """A region that is to be carried: what of it is resident, and how its frames lie (bytes, runs of frames).

    ``loose`` are bytes in base pages, ``in_scratch`` bytes in KHO's scratch, from which preserving moves them away.
    """

    region: Region
    resident: int
    runs: int = 0
    loose: int = 0
    in_scratch: int = 0


@dataclass(frozen=True)
class Met:
    """A guest that is to be carried: its state, and what of a VMM's answer speaks against it.

    ``stays``: it is left as it is, for its VMM has devices in its hands and this is a rehearsal.
    """

    guest: Guest
    state: GuestState
    why_not: str = ""
    incapable: str = ""
    stays: bool = False


@dataclass(frozen=True)
class Facts:
    """All of it; ``jump``: whether a kernel is to be booted, or the handoff only rehearsed."""

    jump: bool
    survival: Survival
    memory: Memory
    kernel: str = ""
    initrd: str = ""
    image: Image | None = None
    image_why: str = ""
    initrd_size: int = 0
    initrd_why: str = ""
    line: str = ""
    here: str = ""
    abis: tuple[str, ...] = ABIS
    kexec_disabled: bool = False
    loaded: bool = False
    limit: tuple[str, int] | None = None
    regions: tuple[Held, ...] = ()
    lost: tuple[str, ...] = ()
    guests: tuple[Met, ...] = ()
    strangers: tuple[Guest, ...] = ()
    sessions: tuple[tuple[int, str], ...] = ()
    opener: int | None = None
    custody: str = ""
    survives: bool = True
    devices: tuple[Passed, ...] = ()
    missing: tuple[str, ...] | None = ()
    lazy: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    users: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class Target:
    """What is to be booted: paths and the whole command line; a path that could not be found is empty."""

    kernel: str
    initrd: str
    line: str


def target(action: Handoff, root: tree.Root = "/") -> Target:
    """The kernel an action means: what it names, else the newest image below /boot, and this kernel's command line."""
    kernel = action.kernel
    if not kernel:
        images = sorted(Path(tree.below(root, "/boot")).glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
        kernel = str(images[-1]) if images else ""
    initrd = action.initrd
    if not initrd and not action.kernel and kernel:
        beside = Path(kernel.replace("vmlinuz-", "initrd.img-"))
        initrd = str(beside) if beside.exists() else ""
    line = action.append or tree.line(root, "/proc/cmdline")
    return Target(kernel, initrd, line)


def gather(desk: Desk, action: Handoff, *, jump: bool) -> Facts:
    """Look at everything a handoff may fail at; nothing is changed.

    Raises:
        NotFound, Denied, KernelRefused, BadFile: this host's memory or command line cannot be read.
    """
    root, state = desk.root, desk.state
    survival = kho.survival(root)
    seen = census.take(root, closed=desk.exempt)
    facts: dict[str, object] = {}
    if jump:
        facts = _of_the_jump(action, root)
        facts["sessions"] = tuple(
            (pid, session.name) for session in outgoing.sessions(seen, root) for pid in session.holders
        )
        if not (isinstance(action, HandoffRun) and action.finish):
            facts["kept"] = kept(desk)
        overs = mappings(seen, state.regions.values(), desk.faces, desk.shields)
        facts["users"] = tuple(sorted({(over.pid, over.region) for over in strays(state, overs)}))
        facts["opener"] = next((each.pid for each in seen.processes.values() if each.holds(luo.DEVICE)), None)
    target_image = facts.get("image")
    image = target_image if isinstance(target_image, Image) else None
    found = passed.gather(desk, image, str(facts.get("line", "")), jump=jump)
    return Facts(
        jump=jump,
        survival=survival,
        memory=read_memory(root),
        limit=_limit(root),
        regions=tuple(
            _held(desk, region, survival.scratch) for region in state.regions.values() if desk.has(region.name)
        ),
        lost=tuple(name for name in state.regions if not desk.has(name)),
        guests=tuple(_met(desk, guest, jump=jump) for guest in state.guests.values()),
        strangers=foreign(seen, state),
        custody=desk.custody.label,
        survives=desk.custody.survives,
        devices=found,
        missing=passed.missing(image, root) if jump and found else (),
        lazy=tuple(
            (grant.id, grant.guest) for grant in state.grants.values() if grant.lazy and _ends(state, grant, jump)
        ),
        **facts,  # type: ignore[arg-type]  # the fields of Facts that _of_the_jump names
    )


def kept(desk: Desk) -> tuple[str, ...]:
    """The sessions of the kernel before that were not finished, as custody calls them."""
    return tuple(name for name in desk.custody.names() if name.startswith(INCOMING))


def _of_the_jump(action: Handoff, root: tree.Root) -> dict[str, object]:
    aim = target(action, root)
    found: dict[str, object] = {
        "kernel": aim.kernel,
        "initrd": aim.initrd,
        "line": aim.line,
        "here": tree.line(root, "/proc/cmdline"),
        "abis": _abis(root),
        "kexec_disabled": _number(root, "/proc/sys/kernel/kexec_load_disabled") == 1,
        "loaded": images.loaded(root),
    }
    try:
        if not aim.kernel:
            raise NotFound("there is no kernel below /boot", "none was named either", "name one: --kernel FILE")
        found["image"] = _inspected(aim.kernel)
    except MemconsoleError as error:
        found["image_why"] = str(error)
    try:
        found["initrd_size"] = Path(aim.initrd).stat().st_size if aim.initrd else 0
    except OSError as error:
        found["initrd_why"] = f"{aim.initrd}: {error.strerror}"
    return found


def _inspected(path: str) -> Image:
    """The image at a path; unpacking takes a second, and is done once for the same file, whoever asks meanwhile."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise tree.failure(path, error) from error
    with _unpacking:
        return _of_file(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


_unpacking = threading.Lock()


@lru_cache(maxsize=4)
def _of_file(path: str, *_identity: int) -> Image:
    return images.inspect(path)


def _number(root: tree.Root, path: str) -> int:
    try:
        return tree.number(root, path)
    except NotFound:
        return 0


def _abis(root: tree.Root) -> tuple[str, ...]:
    """The ABI strings this kernel speaks: where it shows them they count, else those that are known here."""
    shown: dict[str, str] = {}
    for name in ("out/fdt", "in/fdt", "out/sub_fdts/LUO"):
        try:
            for match in _ABI.finditer(tree.read(root, f"{kho.DEBUGFS}/kho/{name}")):
                shown.setdefault(match[1].decode(), match[0].decode())
        except tree.UNREADABLE:
            continue
    return tuple(shown.get(known.partition("-")[0], known) for known in ABIS)


def _limit(root: tree.Root) -> tuple[str, int] | None:
    """The tightest memory.max over this process, with its cgroup; None where there is none."""
    try:
        path = tree.line(root, "/proc/self/cgroup").rpartition("::")[2]
    except tree.UNREADABLE:
        return None
    found: tuple[str, int] | None = None
    while path not in {"", "/"}:
        try:
            text = tree.line(root, f"{_CGROUP}{path}/memory.max")
        except tree.UNREADABLE:
            text = "max"
        if text.isdecimal() and (found is None or int(text) < found[1]):
            found = (path, int(text))
        path = path.rpartition("/")[0]
    return found


def _held(desk: Desk, region: Region, scratch: tuple[Range, ...]) -> Held:
    runs = loose = in_scratch = resident = 0
    with desk.borrowed(region.name) as fds:
        for fd, segment in zip(fds, region.segments, strict=True):
            with ExtentTable.scan_fd(fd, segment.size) as table:
                stats = table.stats()
                runs += stats.runs
                resident += stats.present * PAGE
                for row in table:
                    if not row.flags & Flag.HUGE:
                        loose += row.count * PAGE
                    in_scratch += sum(_overlap(row.pfn * PAGE, (row.pfn + row.count) * PAGE, each) for each in scratch)
    return Held(region, resident, runs, loose, in_scratch)


def _overlap(start: int, end: int, range: Range) -> int:
    return max(0, min(end, range.end) - max(start, range.start))


def _ends(state: State, grant: Grant, jump: bool) -> bool:
    """Whether a grant's process ends in this handoff."""
    guest = state.guests.get(grant.guest)
    return jump or guest is None or guest.kind is not GuestKind.PROCESS


def _state(desk: Desk, live: LiveGuest) -> GuestState:
    """A guest's state; an agent that lost us is given the time to find us again."""
    try:
        return live.state()
    except GuestError:
        if not desk.connected(live.name):
            raise
        return live.state()


def _met(desk: Desk, guest: Guest, *, jump: bool) -> Met:
    live = desk.live(guest.name)
    if live is None:
        return Met(guest, GuestState.GONE)
    stays = not jump and guest.name in desk.spaces.filled
    asked = guest.kind is not GuestKind.PROCESS and not stays
    try:
        state = _state(desk, live)
        incapable = vmm.incapable(desk, live) if asked and state is not GuestState.GONE else ""
    except MemconsoleError as error:
        return Met(guest, guest.state, why_not=str(error))
    return Met(guest, state, incapable=incapable, stays=stays)
