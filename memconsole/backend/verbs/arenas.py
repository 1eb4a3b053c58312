"""``arena create``, ``scan`` and ``remove``: ranges that were set aside at boot become memory of stores.

With a file system they are of the dax store; without one of the devdax or the raw store, each a :class:`PieceStore`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import msgspec

from memconsole.actions import NAME, ArenaCreate, ArenaGrow, ArenaRemove, ArenaScan
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.kernel import pmem
from memconsole.backend.kernel.pmem import Pmem
from memconsole.backend.stores import arena as arenas
from memconsole.backend.stores import namespaces, ranges
from memconsole.backend.stores.base import Found
from memconsole.backend.stores.dax import DaxStore
from memconsole.backend.stores.described import UNIT
from memconsole.backend.stores.pieces import PieceStore
from memconsole.backend.stores.ranges import Opened, Range
from memconsole.backend.stores.raw import UNNAMED, RawStore
from memconsole.backend.work import PreparedAction
from memconsole.model import RegionState
from memconsole.units import format_size


class ArenaKeeping(needs.OwnRegionFds, needs.RuntimeFiles, needs.NotedArenas, Protocol):
    """What the verbs of arenas need."""


class Noting(needs.Stored, needs.NotedArenas, Protocol):
    """What arenas are noted by."""


def create(desk: ArenaKeeping, action: ArenaCreate) -> PreparedAction:
    """Format a range, mount it, and have it say what it is: ``format``. There is no undo."""
    work = PreparedAction(action.name, "")
    _for_a_service(work, desk)
    if action.devdax and action.raw:
        work.refuse("BadArena", "an arena is of one store", "both --devdax and --raw were said", "leave one out")
        return work
    if action.devdax or action.raw:
        (_create_reserved if action.raw else _create_raw)(work, desk, action)
        return work
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
        note(desk)
        work.text = f"arena {action.name} is on {place}: {format_size(made.free)} for regions"

    where = arenas.directory(desk.runtime_dir) / action.name
    work.step("format", f"format {place}, as arena {action.name}, and mount it at {where}", make)
    return work


def _create_raw(work: PreparedAction, desk: ArenaKeeping, action: ArenaCreate) -> None:
    """Have a range say what is in it, without a file system; a block device becomes a devdax device first."""
    stores = _piece_stores(desk)
    known = {each.name: each for each in ranges.devdax(desk.root)}
    wanted = action.device.removeprefix("/dev/")
    blocks = {each.name for each in pmem.devices(desk.root)}
    device: Range | Pmem | None = known.get(wanted)
    if device is None and not wanted and len(known) == 1 and not blocks:
        device = next(iter(known.values()))
    if device is None and (wanted in blocks or not known or not wanted):
        if known and not wanted:
            names = ", ".join([*known, *sorted(blocks)])
            what = "it is not said which range becomes the arena"
            work.refuse("WhichRange", what, f"devices: {names}", f"--device {next(iter(known))}")
            return
        device = _device(work, desk, action)
    elif device is None:
        names = ", ".join([*known, *sorted(blocks)])
        work.refuse("NoRange", f"there is no device {wanted}", f"devices: {names}", "choose one")
    if device is None:
        return
    place = f"{device.path}, {format_size(device.size)}"
    _refuse_raw(work, desk, action.name, device, "daxctl reconfigure-device --mode=devdax, if it is not needed so")
    if work.refusals:
        return
    made: list[Range] = []
    if isinstance(device, Pmem):
        block = device

        def convert() -> None:
            made.append(namespaces.as_devdax(block, desk.root))

        text = f"have {place} be a devdax device: /dev/{device.name} goes, the kernel writes an info block"
        work.step("convert", text, convert)
    else:
        made.append(device)

    _describe(work, desk, stores[ranges.DEVDAX], place, made)


def _describe(work: PreparedAction, desk: ArenaKeeping, store: PieceStore, place: str, made: Sequence[Range]) -> None:
    """Have a range, which is there by then, say that it is the arena that the action names: ``format``."""
    name = work.subject

    def describe() -> None:
        arena = store.create(name, made[0])
        note(desk)
        work.text = f"arena {name} is on {made[0].where}: {format_size(arena.free[0])} for regions"

    work.step("format", f"have {place} say that it is arena {name}, with nothing in it", describe)


def _create_reserved(work: PreparedAction, desk: ArenaKeeping, action: ArenaCreate) -> None:
    """Have a range that the kernel does not manage say what is in it: one that this service was started with."""
    store = _piece_stores(desk).get(RawStore.NAME)
    known = {each.name: each for each in store.ranges()} if isinstance(store, RawStore) else {}
    if store is None or not known:
        remedy = "boot with memmap=SIZE$START of ordinary memory, then memconsole serve --raw START"
        work.refuse("NotNamed", "no range is named that the kernel does not manage", UNNAMED, remedy)
        return
    names = ", ".join(known)
    device = known.get(action.device) if action.device or len(known) > 1 else next(iter(known.values()))
    if device is None:
        code, what = (
            ("NoRange", f"there is no range {action.device}") if action.device else ("WhichRange", "which range?")
        )
        work.refuse(code, what, f"ranges that were named: {names}", f"--device {next(iter(known))}")
        return
    _refuse_raw(work, desk, action.name, device, device.remedy)
    if not work.refusals:
        _describe(work, desk, store, f"{device.where}, {format_size(device.size)}", [device])


def _refuse_raw(work: PreparedAction, desk: ArenaKeeping, name: str, device: Range | Pmem, remedy: str) -> None:
    """What of a range, and of a name, forbids it; ``remedy`` of a device that cannot be used."""
    if isinstance(device, Pmem):
        for refusal in arenas.create_refusals(name, device, desk.root):
            work.refuse(*refusal)
    taken = {each.name for each in arenas.mounted(desk.root)}
    taken |= {each.said.name for store in _piece_stores(desk).values() for each in store.arenas()}
    if not re.fullmatch(NAME, name):
        why = "a name is 1 to 55 letters, digits, dots, dashes and underscores"
        work.refuse("BadName", f"{name!r} cannot be an arena's name", why, "choose another name")
    elif name in taken and not any(each.code == "NameTaken" for each in work.refusals):
        work.refuse("NameTaken", f"there is an arena {name} already", "names are unique", "choose another name")
    if isinstance(device, Pmem):
        return
    what = f"no arena {name} can be made on {device.where}"
    if device.trouble:
        work.refuse("NotOurs" if device.base else "InUse", what, device.trouble, remedy)
        return
    for refusal in arenas.held_refusals(what, ranges.contents(device), *_tools(device)):
        work.refuse(*refusal)


def _tools(device: Range) -> tuple[str, str]:
    """What copies a range to a file, and what writes zeros over it."""
    if not device.base:
        return f"daxio --input={device.path} --output=FILE (of pmdk)", f"daxio --zero --output={device.path}"
    at, count = device.base // UNIT, device.size // UNIT
    return (
        f"dd if={device.path} of=FILE bs=2M skip={at} count={count}",
        f"dd if=/dev/zero of={device.path} bs=2M seek={at} count={count} conv=notrunc",
    )


def _piece_stores(desk: needs.Stored) -> dict[str, PieceStore]:
    return {name: store for name, store in desk.stores.items() if isinstance(store, PieceStore)}


def scan(desk: ArenaKeeping, action: ArenaScan) -> PreparedAction:
    """Mount what is not mounted, and take the regions up that nobody holds: ``take``."""
    del action
    work = PreparedAction("arenas", "")
    _for_a_service(work, desk)
    if work.refusals:
        return work

    def take() -> None:
        taken: list[Found] = []
        for store in desk.stores.values():
            found, told = store.found(held_regions(desk)) if store.may_know() else ([], [])
            work.findings += told
            taken += [take_up(desk, each) for each in found]
        note(desk)
        work.change = msgspec.structs.replace(work.change, regions=tuple(each.region for each in taken))
        names = ", ".join(f"{each.region.name} ({format_size(each.region.size)})" for each in taken)
        work.text = f"regions taken up from arenas: {names or 'none that was not known'}"
        if work.findings:
            work.text += f"; {len(work.findings)} findings: memconsole audit"

    work.step("take", "mount the arenas of this host and take up the regions in them that have no owner here", take)
    return work


def grow(desk: ArenaKeeping, action: ArenaGrow) -> PreparedAction:
    """Have an arena without a file system have all of its range, and take its regions up: ``grow``.

    One with a file system stays as it is: resize2fs refuses clusters, and leaves wrong counts where it is forced.
    """
    work = PreparedAction(action.name, "")
    _for_a_service(work, desk)
    if work.refusals:
        return work
    what = f"arena {action.name} cannot grow"
    stores = _piece_stores(desk).values()
    same = [each for store in stores for each in store.arenas() if each.said.name == action.name]
    larger = [(store, device) for store in stores for name, device in store.larger().items() if name == action.name]
    if any(each.name == action.name for each in arenas.mounted(desk.root)):
        why = "resize2fs refuses a file system with clusters, and leaves wrong counts where it is forced"
        remedy = "memconsole arena create NAME --device DEVICE makes another one of a second range, larger if need be;"
        remedy += " regions are put where there is room"
        work.refuse("NoGrow", what, why, remedy)
    elif same:
        why = f"it has all of its range: {format_size(same[0].device.size)} of {same[0].device.where}"
        work.refuse("NotLarger", what, why, "have a larger range begin where this one does, then the same command")
    elif not larger:
        why = f"no arena of this name lies in a range that became larger; arenas: {_named(desk)}"
        work.refuse("NoSuchArena", f"there is no arena {action.name} to grow", why, "memconsole arena list")
    if work.refusals:
        return work
    store, device = larger[0]

    def do() -> None:
        made = store.grow(device)
        found, told = store.found(held_regions(desk))
        work.findings += told
        taken = [take_up(desk, each) for each in found]
        note(desk)
        work.change = msgspec.structs.replace(work.change, regions=tuple(each.region for each in taken))
        work.text = f"arena {action.name} has {format_size(device.size)} of {device.where}, {format_size(made.free[0])}"
        work.text += f" of it free; regions taken up: {', '.join(each.region.name for each in taken) or 'none'}"

    text = f"have {device.where} say that arena {action.name} has all of its {format_size(device.size)}"
    work.step("grow", f"{text}, and take up the regions in it, which stay where they are", do)
    return work


def _named(desk: ArenaKeeping) -> str:
    names = [each.name for each in arenas.mounted(desk.root)]
    names += [each.said.name for store in _piece_stores(desk).values() for each in store.arenas()]
    return ", ".join(names) or "none is in use"


def remove(desk: ArenaKeeping, action: ArenaRemove) -> PreparedAction:
    """Unmount an arena that has no regions, and zero its range: ``remove``. There is no undo."""
    work = PreparedAction(action.name, f"arena {action.name} is removed; its range holds nothing")
    _for_a_service(work, desk)
    known = {each.name: each for each in arenas.mounted(desk.root)}
    raw = {each.said.name: (store, each) for store in _piece_stores(desk).values() for each in store.arenas()}
    if action.name in raw:
        _remove_raw(work, desk, *raw[action.name])
        return work
    noted = desk.noted
    if action.name not in known and noted is not None and any(each.name == action.name for each in noted.missing()):
        text = f"forget arena {action.name}: its range is not set aside by this kernel, and nothing is written there"
        work.text = f"arena {action.name} is forgotten; what this kernel's memory holds of it is as it was"
        work.step("forget", text, lambda: noted.forget(action.name))
        return work
    if action.name not in known:
        names = ", ".join([*known, *raw]) or "none is mounted"
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
        desk.stores[DaxStore.NAME].close()  # an arena that this process has open cannot be unmounted
        arenas.remove(arena)
        forget(desk, arena.name)

    work.step(
        "remove",
        f"unmount {arena.source}, arena {arena.name}, and write zeros over all {format_size(arena.size)} of it",
        do,
    )
    return work


def _remove_raw(work: PreparedAction, desk: ArenaKeeping, store: PieceStore, arena: Opened) -> None:
    inside = sorted(piece.name for piece in arena.said.pieces)
    if inside:
        work.refuse(
            "ArenaInUse",
            f"arena {arena.said.name} holds {len(inside)} regions",
            f"in it: {', '.join(inside[:8])}",
            "memconsole arena scan takes them up; memconsole copy REGION FILE saves the contents of one",
        )
    if work.refusals:
        return
    size = format_size(arena.device.size)
    stays = "is kept from the kernel, as the command line has it" if store.DERIVED else "stays a devdax device"
    text = f"write zeros over all {size} of {arena.device.where}, arena {arena.said.name}; it {stays}"

    def do() -> None:
        store.remove(arena)
        forget(desk, arena.said.name)

    work.step("remove", text, do)


def note(desk: Noting) -> None:
    """Write down which arenas are in use."""
    if desk.noted is not None:
        desk.noted.look(desk.stores.values())


def forget(desk: needs.NotedArenas, name: str) -> None:
    """Have an arena that was removed be noted no more."""
    if desk.noted is not None:
        desk.noted.forget(name)


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
