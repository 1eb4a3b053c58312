"""``arena create``, ``scan`` and ``remove``: ranges that were set aside at boot become memory of the dax store."""

from __future__ import annotations

from typing import Protocol

import msgspec

from memconsole.actions import ArenaCreate, ArenaRemove, ArenaScan
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.holdings import custody_name
from memconsole.backend.kernel import pmem
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores.base import Found
from memconsole.backend.work import PreparedAction
from memconsole.model import RegionState
from memconsole.units import format_size

STORE = "dax"


class ArenaKeeping(needs.OwnRegionFds, needs.RuntimeFiles, Protocol):
    """What the verbs of arenas need."""


def create(desk: ArenaKeeping, action: ArenaCreate) -> PreparedAction:
    """Format a range, mount it, and have it say what it is: ``format``. There is no undo."""
    work = PreparedAction(action.name, "")
    _for_a_service(work, desk)
    device = _device(work, desk, action)
    if device is None or work.refusals:
        return work
    for refusal in arenas.create_refusals(action.name, device, desk.root):
        work.refuse(*refusal)
    if work.refusals:
        return work
    place = f"{device.path}, {format_size(device.size)}"

    def make() -> None:
        made = arenas.create(action.name, device, desk.runtime_dir, desk.root)
        work.text = f"arena {action.name} is on {place}: {format_size(made.free)} for regions"

    where = arenas.directory(desk.runtime_dir) / action.name
    work.step("format", f"format {place}, as arena {action.name}, and mount it at {where}", make)
    return work


def scan(desk: ArenaKeeping, action: ArenaScan) -> PreparedAction:
    """Mount what is not mounted, and take the regions up that nobody holds: ``take``."""
    del action
    work = PreparedAction("arenas", "")
    _for_a_service(work, desk)
    if work.refusals:
        return work

    def take() -> None:
        found, work.findings = desk.stores[STORE].found(held_regions(desk))
        taken = [take_up(desk, each) for each in found]
        work.change = msgspec.structs.replace(work.change, regions=tuple(each.region for each in taken))
        names = ", ".join(f"{each.region.name} ({format_size(each.region.size)})" for each in taken)
        work.text = f"regions taken up from arenas: {names or 'none that was not known'}"
        if work.findings:
            work.text += f"; {len(work.findings)} findings: memconsole audit"

    work.step("take", "mount the arenas of this host and take up the regions in them that have no owner here", take)
    return work


def remove(desk: ArenaKeeping, action: ArenaRemove) -> PreparedAction:
    """Unmount an arena that has no regions, and zero its range: ``remove``. There is no undo."""
    work = PreparedAction(action.name, f"arena {action.name} is removed; its range holds nothing")
    _for_a_service(work, desk)
    known = {each.name: each for each in arenas.mounted(desk.root)}
    if action.name not in known:
        names = ", ".join(known) or "none is mounted"
        what = f"there is no arena {action.name}"
        work.refuse("NoSuchArena", what, f"arenas: {names}", "memconsole arena list, or arena scan")
        return work
    arena = known[action.name]
    inside = sorted(path.name for path in arena.path.iterdir() if path.is_file())
    if inside:
        work.refuse(
            "ArenaInUse",
            f"arena {arena.name} holds {len(inside)} files",
            f"in it: {', '.join(inside[:8])}",
            "memconsole arena scan takes up what is a region; memconsole copy REGION FILE saves its contents",
        )
    if work.refusals:
        return work

    def do() -> None:
        desk.stores[STORE].close()  # an arena that this process has open cannot be unmounted
        arenas.remove(arena)

    work.step(
        "remove",
        f"unmount {arena.source}, arena {arena.name}, and write zeros over all {format_size(arena.size)} of it",
        do,
    )
    return work


def held_regions(desk: needs.InCustody) -> frozenset[str]:
    """The regions that custody holds something of."""
    return frozenset(name.split(":")[1] for name in desk.custody.names() if name.startswith("region:"))


def take_up(desk: needs.OwnRegionFds, found: Found) -> Found:
    """Hold a region that a store has found, here and in custody."""
    region = msgspec.structs.replace(found.region, state=RegionState.RESERVED)
    for index, fd in enumerate(found.fds):
        payloads.put(desk.custody, custody_name(region.name, index), fd, region)
    desk.hold_region(region.name, found.fds)
    return found._replace(region=region)


def _for_a_service(work: PreparedAction, desk: needs.InCustody) -> None:
    if not desk.custody.survives:
        why = "what is in an arena outlives this process, which keeps nothing"
        work.refuse("NoService", "arenas are for a service", why, "memconsole serve, then the same command")


def _device(work: PreparedAction, desk: needs.HostTree, action: ArenaCreate) -> Pmem | None:
    known = {each.name: each for each in pmem.devices(desk.root)}
    wanted = action.device.removeprefix("/dev/")
    if not known:
        what = "no range of memory is set aside on this host"
        work.refuse("NoRange", what, "there is no /dev/pmem device", arenas.words(desk.root))
    elif wanted and wanted not in known:
        work.refuse("NoRange", f"there is no pmem device {wanted}", f"devices: {', '.join(known)}", "choose one")
    elif not wanted and len(known) > 1:
        what = "it is not said which range becomes the arena"
        work.refuse("WhichRange", what, f"devices: {', '.join(known)}", f"--device {next(iter(known))}")
    else:
        return known[wanted] if wanted else next(iter(known.values()))
    return None
