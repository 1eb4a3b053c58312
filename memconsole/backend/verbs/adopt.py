"""``guest adopt|let-go``: the RAM of a VM that somebody else runs, taken into custody while it runs, and let go of.

    ask    its QEMU is asked once which RAM block is where (libvirt's through libvirt, others by their QMP socket)
    hold   each block is the file that QEMU has open for it, by device and inode: custody gets a descriptor of it
    join   its process is watched

RAM that is private, or of huge pages, is moved first, if that is asked for (``--copy``, :mod:`.relocate`). Of any other
guest nothing is paused and no memory is touched: no seal, no page, no size. What is planned is what can be seen without
asking: the files that its process maps, and the memory backends in its command line.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from memconsole.actions import GuestAdopt, GuestLetGo
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.guests.ramblocks import region_name
from memconsole.backend.handoff.adopted_facts import adopted_anew
from memconsole.backend.handoff.carried_back import Returning
from memconsole.backend.handoff.hindrances import hindrances
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.managers import virsh
from memconsole.backend.managers.guest_memory import Block, backends
from memconsole.backend.stores import adopted
from memconsole.backend.stores.adopted import RamFile
from memconsole.backend.verbs import adoptees, handoff, relocate
from memconsole.backend.verbs.regions import drop_custody
from memconsole.backend.verbs.relocate import Removal
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError, MemconsoleError
from memconsole.model import Guest, GuestState, Refusal, Region
from memconsole.units import format_size

_MOVED = "memconsole guest adopt {} --copy moves it, for which the guest stands still for a second or two"
_COPIED = frozenset({"PrivateRam", "HugePages", "NotInMemory"})
"""The refusals of RAM that can be moved."""
_SHARED = (
    "put <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking> into its XML (virsh edit NAME),"
    " and start it anew"
)
_BY_HAND = "start it with -object memory-backend-memfd,id=mem0,size=SIZE,share=on -machine memory-backend=mem0"


class Adopting(needs.OwnRegionFds, needs.GuestStarting, needs.ForeignMemory, Protocol):
    """What ``guest adopt`` needs."""


class LettingGo(Returning, needs.OwnRegionFds, Protocol):
    """What ``guest let-go`` needs."""


@dataclass
class _Adoption:
    """One guest on its way: ``shown`` as a Snapshot has it, ``guest`` as the ledger will; ``files`` can be held."""

    shown: Guest
    guest: Guest
    files: tuple[RamFile, ...]
    qmp: str = ""
    again: bool = False
    blocks: tuple[tuple[Block, RamFile], ...] = ()
    held: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of its RAM."""
        return sum(file.size for file in self.files)


def adopt(desk: Adopting, action: GuestAdopt) -> PreparedAction:
    """Adopt one guest, or every one of libvirt's that can be; what keeps one of several is told and refuses none."""
    work = PreparedAction(action.name, "")
    if bool(action.name) == action.all or (action.all and action.qmp):
        why = "with --all neither a name nor --qmp is said"
        work.refuse("WhichGuest", "no guest is named, or more than one", why, "name one, or say --all")
        return work
    if not action.all:
        one = _one(desk, action)
        if isinstance(one, Refusal):
            work.refusals.append(one)
        else:
            _adopted(work, desk, [one])
        return work
    found = [_judged(desk, each, "", action.copy) for each in desk.foreign_guests() if each.managed is not None]
    kept = [each for each in found if isinstance(each, Refusal)]
    going = [each for each in found if not isinstance(each, Refusal)]
    if not going:
        what = "no guest of libvirt runs that is not adopted"
        work.refusals += kept or [Refusal("NoSuchGuest", what, "", "memconsole guests lists the guests")]
        return work
    _adopted(work, desk, going)
    work.subject = "all guests of libvirt"
    if kept:
        work.note += "; " if work.note else ""
        work.note += "not adopted: " + "; ".join(f"{each.what} ({each.why})" for each in kept)
    return work


def _one(desk: Adopting, action: GuestAdopt) -> _Adoption | Removal | Refusal:
    known = _ledgers(desk, action.name)
    if known is not None:
        return _known(desk, known, action.qmp)
    for shown in desk.foreign_guests():
        if shown.name == action.name:
            return _judged(desk, shown, action.qmp, action.copy)
    if action.qmp:
        return _by_socket(desk, action)
    known_names = ", ".join(each.name for each in desk.foreign_guests()) or "none"
    what = f"there is no VM {action.name} that memconsole does not manage"
    return Refusal("NoSuchGuest", what, f"such VMs: {known_names}", "memconsole guests lists the guests")


def _by_socket(desk: Adopting, action: GuestAdopt) -> _Adoption | Removal | Refusal:
    """A QEMU by its QMP socket, called as the operator wants it to be called."""
    try:
        pid = desk.monitor_process(action.qmp)
    except MemconsoleError as error:
        return Refusal(error.code, error.what, error.why, error.remedy)
    shown = next((each for each in desk.foreign_guests() if each.pid == pid), None)
    if shown is None:
        what = f"process {pid}, which has {action.qmp}, is no VM that could be adopted"
        return Refusal(
            "NoSuchGuest", what, "it is a guest already, or it is no QEMU", "memconsole guests lists the guests"
        )
    return _judged(desk, replace(shown, name=action.name), action.qmp, action.copy)


def _known(desk: Adopting, guest: Guest, qmp: str) -> _Adoption | Refusal:
    """A guest of the ledger: adopted already, perhaps with RAM that came later."""
    if not guest.adopted:
        return Refusal("Ours", f"guest {guest.name} is memconsole's own", "its RAM is a region", "nothing need be done")
    live = desk.live_guest(guest.name)
    if live is None or live.state() is GuestState.GONE:
        remedy = f"adopt it as it runs now: {adopted_anew(desk, guest)}"
        why = f"what is in custody is the RAM of process {guest.pid}, which ended: saved and restored, or started anew"
        return Refusal("GuestGone", f"guest {guest.name} was adopted and has ended", why, remedy)
    try:
        files = desk.ram_files(guest)
    except MemconsoleError as error:
        return Refusal(error.code, error.what, error.why, error.remedy)
    held = {(each.device, each.inode) for name in desk.state.regions for each in desk.state.regions[name].segments}
    more = tuple(file for file in files if file.can_be_held and file.identity not in held)
    if not more:
        remedy = f"memconsole guest let-go {guest.name} undoes it"
        return Refusal("AlreadyAdopted", f"guest {guest.name} is adopted", "custody has all of its RAM", remedy)
    refusal = _unreachable(guest, qmp) or _busy(guest)
    return refusal or _Adoption(guest, guest, more, qmp, again=True)


def _judged(desk: Adopting, shown: Guest, qmp: str, copy: bool) -> _Adoption | Removal | Refusal:
    """A VM that runs here without memconsole, as far as can be seen without asking it."""
    former = _former(desk, shown)
    if former is not None:
        return _known(desk, former, qmp)
    name = adoptees.name_of(desk, shown)
    refusal = _unreachable(shown, qmp) or _busy(shown) or adoptees.left_over(desk, shown, name)
    if refusal is not None:
        return refusal
    files = _holdable(desk, shown)
    if isinstance(files, Refusal):
        return relocate.judged(desk, shown, name) if copy and files.code in _COPIED else files
    return _Adoption(shown, adoptees.guest_of(shown, name), files, qmp)


def _former(desk: needs.LedgerState, shown: Guest) -> Guest | None:
    """The guest of the ledger that a domain was, as another process: it was adopted then."""
    if shown.managed is None or shown.managed.user is not None:
        return None
    uuid = shown.managed.uuid
    adopted_ones = (each for each in desk.state.guests.values() if each.adopted and each.managed is not None)
    return next((each for each in adopted_ones if each.managed and each.managed.is_systems(uuid)), None)


def _holdable(desk: Adopting, shown: Guest) -> tuple[RamFile, ...] | Refusal:
    """The files of its RAM that custody can hold as they are; or why none."""
    refusal = _private(shown)
    if refusal is not None:
        return refusal
    try:
        files = desk.ram_files(shown)
    except MemconsoleError as error:
        return Refusal(error.code, error.what, error.why, error.remedy)
    good = tuple(file for file in files if file.can_be_held)
    return good or _refused(shown, [file for file in files if not file.can_be_held])


def _refused(shown: Guest, files: Sequence[RamFile]) -> Refusal:
    """Why nothing of what a process maps can be held: that of the largest file, or that there is none."""
    largest = max(files, key=lambda file: file.size, default=None)
    error = adopted.why_not(largest) if largest is not None else None
    if error is None:
        return _of_private(shown, "its process maps no memory that could be shared")
    return Refusal(
        error.code, f"guest {shown.name} cannot be adopted: {error.what}", error.why, _or_moved(shown, error.remedy)
    )


# --- what adopting refuses --------------------------------------------------------------------------------------


def _unreachable(shown: Guest, qmp: str) -> Refusal | None:
    """There must be a way to ask its QEMU."""
    if shown.managed is not None and shown.managed.user is not None:
        what = f"guest {shown.name} cannot be adopted: the session daemon of user {shown.managed.user} runs it"
        why = "its next start would be that daemon's, which has no hook and no right to RAM of memconsole's"
        return Refusal("SessionDomain", what, why, "define it for the system's libvirt (qemu:///system)")
    if shown.managed is not None:
        if qmp:
            why = f"{shown.managed.manager} has its monitor, and is asked through it"
            return Refusal("Managed", f"guest {shown.name} is not asked by {qmp}", why, "leave --qmp out")
        if not virsh.installed():
            what = f"libvirt cannot be asked for guest {shown.name}: there is no {virsh.BINARY}"
            return Refusal("NoVirsh", what, "it is not on the PATH", "apt install libvirt-clients")
        return None
    if not qmp:
        what = f"QEMU cannot be asked where the RAM of guest {shown.name} is"
        why = "libvirt does not run it, and no QMP socket of it is named"
        return Refusal("NoMonitor", what, why, f"memconsole guest adopt {shown.name} --qmp PATH")
    return None


def _busy(shown: Guest) -> Refusal | None:
    job = shown.managed.job if shown.managed is not None else ""
    if not job:
        return None
    what = f"libvirt does something with guest {shown.name}: {job}"
    return Refusal(
        "JobUnderWay", what, "its RAM may be on its way elsewhere", "wait until it has ended: virsh domjobinfo"
    )


def _private(shown: Guest) -> Refusal | None:
    """Whether its command line says that a part of its RAM is its own alone."""
    if "-readconfig" in shown.command:
        return None  # its memory backends are in a file: its monitor knows them
    try:
        known = backends(shown.command)
    except MemconsoleError as error:
        return Refusal(error.code, error.what, error.why, error.remedy)
    if not known:
        return _of_private(shown, "its command line has no memory backend")
    private = [each.id for each in known if not each.shared]
    return _of_private(shown, f"not shared: {', '.join(private)}") if private else None


def _of_private(shown: Guest, why: str) -> Refusal:
    remedy = _or_moved(shown, _SHARED if shown.managed is not None else _BY_HAND)
    return Refusal("PrivateRam", f"guest {shown.name} cannot be adopted: its RAM is private", why, remedy)


def _or_moved(shown: Guest, remedy: str) -> str:
    """A remedy, where it could also be moved."""
    return f"{_MOVED.format(shlex.quote(shown.name))}; or {remedy}" if shown.managed is not None else remedy


# --- what adopting does -----------------------------------------------------------------------------------------


def _adopted(work: PreparedAction, desk: Adopting, going: Sequence[_Adoption | Removal]) -> None:
    fresh = (each for each in going if isinstance(each, Removal) or not each.again)
    work.aims = replace(work.aims, guests=tuple(each.guest for each in fresh))
    work.subject = going[0].guest.name
    total = format_size(sum(each.size for each in going))
    names = ", ".join(each.guest.name for each in going)
    work.text = f"{names} adopted: {total} of RAM in custody"
    moved = [each for each in going if isinstance(each, Removal)]
    work.note = relocate.note_of(moved) if moved else ""
    for each in going:
        if isinstance(each, Removal):
            relocate.steps_of(work, desk, each)
        else:
            _steps(work, desk, each)


def _steps(work: PreparedAction, desk: Adopting, one: _Adoption) -> None:
    name = one.guest.name
    through = "through libvirt, which marks the domain custom-monitor" if not one.qmp else f"by {one.qmp}"

    def ask() -> None:
        one.blocks = _matched(one, desk.ask_ram(one.shown, one.qmp), desk.ram_files(one.shown))

    work.step(f"ask-{name}", f"ask the QEMU of {one.shown.name} once where its RAM is, {through}", ask)
    kinds = ", ".join(f"{format_size(file.size)} ({file.kind})" for file in one.files)
    work.step(
        f"hold-{name}",
        f"put the RAM of process {one.guest.pid} into custody while it runs: {kinds}; no pause, no copy",
        partial(_hold, work, desk, one),
        partial(_drop, desk, one),
        "take it out of custody",
    )
    if not one.again:
        said = hindrances(one.shown.managed) if one.shown.managed is not None else []
        left = f"; what speaks against carrying it: {', '.join(said)}" if said else ""
        work.step(
            f"join-{name}",
            f"watch it as guest {name}{left}",
            lambda: _watch(desk, one.guest),
            lambda: desk.remove_guest(name),
            "watch it no more",
        )


def _watch(desk: Adopting, guest: Guest) -> None:
    desk.adopt_guest(guest)


def _matched(one: _Adoption, blocks: Sequence[Block], files: Sequence[RamFile]) -> tuple[tuple[Block, RamFile], ...]:
    """Each block with the file that it is, those that are held already left out.

    Raises:
        GuestError: a block is no file that can be held.
    """
    by_start = {file.start: file for file in files}
    wanted = {file.identity for file in one.files}
    found = []
    for block in blocks:
        file = by_start.get(block.hva)
        if block.nv and (file is None or not file.can_be_held):
            continue  # an nvdimm is a file that stays where it is
        what = f"guest {one.shown.name} cannot be adopted: block {block.name} of its RAM"
        if file is None or not block.shared:
            remedy = _SHARED if one.shown.managed else _BY_HAND
            raise GuestError(f"{what} is private", "other RAM of it is shared", remedy, code="PrivateRam")
        error = adopted.why_not(file)
        if error is not None:
            raise GuestError(f"{what}: {error.what}", error.why, error.remedy, code=error.code)
        if file.size != block.size:
            why = f"QEMU says {block.size} bytes, its process maps {file.size}"
            raise GuestError(f"{what} is a part of a file", why, "give it a file of its own", code="PartOfFile")
        if file.identity in wanted or not one.again:
            found.append((block, file))
    if not found:
        raise GuestError(f"QEMU names no RAM of guest {one.shown.name}", "", "look at it: virsh dumpxml NAME")
    return tuple(found)


def _hold(work: PreparedAction, desk: Adopting, one: _Adoption) -> None:
    try:
        for block, file in one.blocks:
            _hold_block(work, desk, one, block, file)
    except BaseException:
        _drop(desk, one)
        raise
    if not one.again:
        made = replace(one.guest, memory=sum(block.size for block, _ in one.blocks))
        work.change = replace(work.change, guests=(*work.change.guests, made))


def _hold_block(work: PreparedAction, desk: Adopting, one: _Adoption, block: Block, file: RamFile) -> None:
    name = region_name(one.guest.name, block.name)
    fd = desk.open_ram(one.shown, file)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        size = os.fstat(fd).st_size
        if size != block.size:
            why = f"the file has {size} bytes, the block {block.size}"
            raise GuestError(f"block {block.name} of guest {one.guest.name} is not one file", why, code="PartOfFile")
        region = adoptees.region_of(desk, name, fd, block.size, block.name)
        payloads.put(desk.custody, custody_name(name, 0), fd, region)
        one.held.append(name)
        desk.hold_region(name, (fd,))
        undo.pop_all()
    number = desk.state.next_grant + len(work.change.grants)
    grants = tuple(adoptees.grants_of(number, region, one.guest.name, block.parts))
    change = work.change
    work.change = replace(change, regions=(*change.regions, region), grants=(*change.grants, *grants))


def _drop(desk: Adopting, one: _Adoption) -> None:
    for name in one.held:
        desk.close_fds(name)
        drop_custody(desk, name)
    one.held.clear()


def drop_unfinished(desk: needs.OwnRegionFds, guests: Sequence[Guest], but: Collection[str] = ()) -> None:
    """Take out of custody what an adoption that was cut short has put there; the guests have it, and go on."""
    for guest in guests:
        for held in desk.custody.names():
            kind, _, rest = held.partition(":")
            name = rest.rpartition(":")[0]
            own = name.startswith(f"{guest.name}.") and name not in but
            if kind == "region" and own and name not in desk.state.regions:
                fd, payload = desk.custody.get(held)
                os.close(fd)
                with contextlib.suppress(MemconsoleError):  # it is not what an adoption puts there
                    if payloads.read(held, payload, Region).store == adopted.NAME:
                        desk.custody.drop(held)


# --- letting go -------------------------------------------------------------------------------------------------


def _ledgers(desk: needs.LedgerState, name: str) -> Guest | None:
    """The guest of the ledger that is called so, there or by its manager."""
    state = desk.state
    by_manager = (each for each in state.guests.values() if each.adopted and each.managed and each.managed.name == name)
    return state.guests.get(name) or next(by_manager, None)


def let_go(desk: LettingGo, action: GuestLetGo) -> PreparedAction:
    """Undo an adoption: ``drop`` takes its RAM out of custody, ``part`` watches it no more.

    The RAM of a guest that has ended is nowhere else any more: its regions stay.
    """
    work = PreparedAction(action.name, "")
    guest = _ledgers(desk, action.name)
    if guest is None or not guest.adopted:
        adopted_ones = ", ".join(each.name for each in desk.state.guests.values() if each.adopted) or "none"
        what = f"there is no adopted guest {action.name}"
        work.refuse("NoSuchGuest", what, f"adopted guests: {adopted_ones}", "memconsole guests lists the guests")
        return work
    grants = desk.state.grants_of(guest=guest.name)
    regions = sorted({grant.region for grant in grants})
    live = desk.live_guest(guest.name)
    runs = live is not None and live.state() is not GuestState.GONE
    waits = handoff.is_carried(desk, guest.name)
    going = [name for name in regions if runs or not desk.holds_region(name)]
    left = [name for name in regions if name not in going]
    work.subject = guest.name
    work.text = f"guest {guest.name} is let go" + ("; it runs on as it did" if runs else "; it had ended")
    if waits:
        work.text += "; the state that a handoff saved of it is dropped"
    if left:
        work.text += f"; its RAM stays in custody as {', '.join(left)}: memconsole release REGION frees it"

    def drop() -> None:
        for name in going:
            desk.close_fds(name)
            drop_custody(desk, name)

    if going:
        size = sum(desk.state.regions[name].size for name in going if name in desk.state.regions)
        work.step("drop", f"take {format_size(size)} of RAM out of custody; the guest has it and goes on", drop)
    elif left:
        work.step("keep", f"end its grants; {', '.join(left)} stay in custody with its RAM", lambda: None)

    def part() -> None:
        if waits:
            handoff.discard_carried(desk, guest.name)
        desk.remove_guest(guest.name)

    work.step("part", f"watch process {guest.pid} no more", part)
    work.change = StateChange(
        without_guests=(guest.name,),
        without_grants=tuple(grant.id for grant in grants),
        without_regions=tuple(going),
    )
    return work
