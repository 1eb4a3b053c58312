"""``guest adopt --copy``: RAM that only its QEMU can hold is moved into files, and libvirt starts its guest on them.

    ask      its QEMU is asked what RAM it has
    make     a file for each block, on a tmpfs, with a note of what is begun
    hold     they are regions in custody
    look     the image begins; what QEMU is set to is written down
    set      QEMU is to send as fast as it can
    copy     the RAM is copied while the guest runs; at the end it stands still
    end      its QEMU ends; from here on the image and the files are the guest
    start    libvirt restores it on the files
    join     its process is watched

What is cut short is ended by :func:`settle`, at the next start and every few seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.guests import moves
from memconsole.backend.guests.moves import Move
from memconsole.backend.guests.relocation import Relocation
from memconsole.backend.handoff.hindrances import hindrances
from memconsole.backend.kernel import tree
from memconsole.backend.ledger.state import EventRecord, Recorded, StateChange
from memconsole.backend.managers import libvirt_setup
from memconsole.backend.stores import memfd
from memconsole.backend.verbs import adoptees
from memconsole.backend.verbs.regions import drop_custody
from memconsole.backend.work import PreparedAction
from memconsole.errors import MemconsoleError
from memconsole.model import Grant, Guest, Refusal, Region
from memconsole.units import format_duration, format_size

log = logging.getLogger(__name__)

RATE = 400 << 20
"""Bytes a second that a plan counts with: a third of what its bench measured, 1.2 GiB on two busy cores."""
_LAST_S = 0.3
"""Seconds that QEMU's last round takes at most (its downtime-limit), unless a guest writes faster than it is copied."""
_AGAIN_S = 2.0
"""Seconds for libvirt to end a QEMU and to start another; a guess that a plan counts with."""
_ENFORCED = "/sys/fs/selinux/enforce"
_NOT_ON_FILES = frozenset({"nvdimm", "virtio-mem", "virtio-pmem"})


class Relocating(needs.OwnRegionFds, needs.GuestStarting, needs.ForeignMemory, Protocol):
    """What moving a guest's RAM needs."""


class Settling(needs.OwnRegionFds, needs.GuestStarting, Protocol):
    """What ending a move needs that was cut short."""


@dataclass
class Removal:
    """One guest on its way to other RAM: ``shown`` as a Snapshot has it, ``guest`` as the ledger will."""

    shown: Guest
    guest: Guest
    size: int


def judged(desk: Relocating, shown: Guest, name: str) -> Removal | Refusal:
    """A domain whose RAM can only be copied, as far as can be seen without asking."""
    if shown.managed is None:
        why = "libvirt does not run it, and memconsole cannot start it again as it was"
        what = f"the RAM of guest {shown.name} cannot be moved"
        return Refusal("NoManager", what, why, "shut it down, and start it with shared RAM")
    refusal = _not_here(desk) or _unmovable(shown)
    if refusal is not None:
        return refusal
    size = shown.memory or 0
    refusals = memfd.reserve_refusals(size, promised=desk.promised_bytes(), root=desk.root)
    return refusals[0] if refusals else Removal(shown, adoptees.guest_of(shown, name), size)


def _not_here(desk: Relocating) -> Refusal | None:
    """What of this host keeps every guest from being moved."""
    what = "no guest's RAM can be moved"
    if not desk.custody.survives:
        why = "this memconsole has no service: what it holds would end with it"
        return Refusal("NoService", what, why, "systemctl start memconsole, or memconsole serve")
    try:
        lacking = [part for part in libvirt_setup.lacking(libvirt_setup.status(desk.root)) if "order" not in part.id]
    except MemconsoleError as error:
        return Refusal("HookMissing", what, str(error), error.remedy)
    if lacking:
        why = "; ".join(f"{part.title}: {part.why or part.state}" for part in lacking)
        return Refusal("HookMissing", f"{what} without libvirt's hook", why, lacking[0].remedy)
    with contextlib.suppress(*tree.UNREADABLE):
        if tree.line(desk.root, _ENFORCED) == "1":
            why = "SELinux is enforced, with which this was never tried"
            return Refusal("Selinux", what, why, "start the guest with <source type='memfd'/>: it is adopted as it is")
    return None


def _unmovable(shown: Guest) -> Refusal | None:
    """What of a guest keeps it from being moved: what libvirt could not save and restore either."""
    managed = shown.managed
    if managed is None:
        return None
    what = f"the RAM of guest {shown.name} cannot be moved"
    if managed.state not in {"running", "paused"}:
        return Refusal("NotRunning", what, f"libvirt says {managed.state}", "resume it first, or shut it down")
    found = [each for each in hindrances(managed) if "RAM" not in each]
    found += [f"memory device {each.model}" for each in managed.modules if each.model in _NOT_ON_FILES]
    if any("host-nodes" in word for word in shown.command):
        found.append("RAM that is bound to NUMA nodes of the host (<numatune>)")
    if not found:
        return None
    return Refusal("Hindered", what, "; ".join(found), "detach it, or wait until it has ended; then try again")


def note_of(going: list[Removal]) -> str:
    """What a plan says of those that are moved."""
    names = ", ".join(one.shown.name for one in going)
    return (
        f"the XML of {names} is not changed: the next cold start is on RAM of its own again"
        " (virsh edit NAME: <source type='memfd'/>, <access mode='shared'/> would make it adoptable as it is);"
        " others see the domain end and start (a new ID)"
    )


def steps_of(work: PreparedAction, desk: Relocating, one: Removal) -> None:
    """Add the steps."""
    move = Relocation(desk.root, desk.runtime_dir, one.guest, one.shown)
    name, said = one.guest.name, one.shown.name
    size = format_size(one.size)

    def ask() -> None:
        move.ask(desk.ask_ram(one.shown, ""))

    work.step(f"ask-{name}", f"ask the QEMU of {said} what RAM it has, through libvirt (custom-monitor)", ask)
    work.step(f"make-{name}", f"make files for {size} of RAM on a tmpfs", move.make, move.back_make, "take them away")
    work.step(
        f"hold-{name}",
        f"put them into custody as regions ({desk.custody.label})",
        partial(_hold, desk, move),
        partial(_drop, desk, move),
        "take them out of custody",
    )
    work.step(f"look-{name}", f"see what the QEMU of {said} is set to, and begin its image", move.look)
    work.step(
        f"set-{name}",
        f"have the QEMU of {said} send as fast as it can",
        move.set,
        move.back_set,
        "set it as it was",
    )
    copied = format_duration(int(one.size / RATE * 1e9))
    work.step(
        f"copy-{name}",
        f"copy {size} of RAM while {said} runs, {copied} at most at {format_size(RATE)}/s; it stands still at the end",
        move.copy,
        move.back_copy,
        "let it go on",
    )
    work.step(f"end-{name}", "end its QEMU (virsh destroy)", move.end, move.back_end, "start it on what was copied")
    _started(work, desk, move, one)


def _started(work: PreparedAction, desk: Relocating, move: Relocation, one: Removal) -> None:
    name, said = one.guest.name, one.shown.name
    still = _LAST_S + _AGAIN_S
    most = one.size / RATE + _AGAIN_S
    found: list[Guest] = []

    def start() -> None:
        found.append(move.start())

    def join() -> None:
        guest = found[-1]
        desk.adopt_guest(guest)
        work.change = _with(work.change, _change_of(desk, move.move, guest, len(work.change.grants)))
        work.text += f"; {name}: {move.told()}"
        work.after = partial(_after, work.after, move)

    work.step(
        f"start-{name}",
        f"have libvirt start {said} on it (virsh restore): from the end of the copy until here it stands still, about"
        f" {still:.1f} s, {most:.1f} s if it writes faster than is copied",
        start,
    )
    work.step(f"join-{name}", f"watch it as guest {name}", join, lambda: desk.remove_guest(name), "watch it no more")


def _with(change: StateChange, more: StateChange) -> StateChange:
    return replace(
        change,
        regions=(*change.regions, *more.regions),
        grants=(*change.grants, *more.grants),
        guests=(*change.guests, *more.guests),
    )


def _hold(desk: Relocating, move: Relocation) -> None:
    try:
        for block, fd in zip(move.move.blocks, move.fds, strict=True):
            region = adoptees.region_of(desk, block.region, fd, block.size, block.name)
            payloads.put(desk.custody, custody_name(region.name, 0), fd, region)
            desk.hold_region(region.name, (os.dup(fd),))
    except BaseException:
        _drop(desk, move)
        raise


def _drop(desk: Relocating, move: Relocation) -> None:
    """Take the files out of custody, unless they may be all that is left of the guest."""
    if not move.is_kept:
        _let_go(desk, move.move)


def _after(before: Callable[[], None] | None, move: Relocation) -> None:
    if before is not None:
        before()
    move.done()


def _let_go(desk: needs.OwnRegionFds, move: Move) -> None:
    for block in move.blocks:
        if block.region not in desk.state.regions:
            desk.close_fds(block.region)
            drop_custody(desk, block.region)


def _change_of(desk: needs.OwnRegionFds, move: Move, guest: Guest, before: int = 0) -> StateChange:
    """What the ledger has of a guest that runs on its files; ``before`` grants are on their way there already."""
    regions: list[Region] = []
    grants: list[Grant] = []
    for block in move.blocks:
        regions.append(_held(desk, block.region))
        first = desk.state.next_grant + before + len(grants)
        grants += adoptees.grants_of(first, regions[-1], guest.name, block.parts)
    return StateChange(regions=tuple(regions), grants=tuple(grants), guests=(guest,))


def _held(desk: needs.OwnRegionFds, name: str) -> Region:
    """A region that custody holds, and this process too from now on."""
    held = custody_name(name, 0)
    fd, payload = desk.custody.get(held)
    if desk.holds_region(name):
        os.close(fd)
    else:
        desk.hold_region(name, (fd,))
    return payloads.read(held, payload, Region)


# --- what was cut short -----------------------------------------------------------------------------------------


def settle(desk: Settling) -> Recorded[None]:
    """End every move that was cut short, as far as libvirt and QEMU answer; the others wait for the next time."""
    for move in moves.pending(desk.runtime_dir):
        name, now = move.guest.name, time.time_ns()
        try:
            guest = moves.settle(move, desk.root)
        except MemconsoleError as error:
            log.warning("the RAM of %s was on its way, and is not settled: %s", name, error)
            continue
        known = desk.state.guests.get(name)
        if guest is None:
            _let_go(desk, move)
            text = f"moving the RAM of {name} was cut short: it is where it was, or has ended"
            yield EventRecord(now, "not-moved", name, text)
        elif known is None or known.process != guest.process:
            desk.remove_guest(name)
            desk.adopt_guest(guest)
            text = f"{name} runs on the RAM it was moved to (carried through)"
            yield EventRecord(now, "adopted", name, text, change=_change_of(desk, move, guest))
        moves.forget(move)


def regions_on_their_way(desk: needs.RuntimeFiles) -> frozenset[str]:
    """The regions in custody of guests whose moves are not settled."""
    return frozenset(block.region for move in moves.pending(desk.runtime_dir) for block in move.blocks)
