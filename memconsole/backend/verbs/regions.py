"""``reserve`` and ``release``: a region comes into being in custody, and goes with its frames."""

from __future__ import annotations

import time
from typing import Protocol

import msgspec

from memconsole.actions import Release, Reserve
from memconsole.backend import needs
from memconsole.backend.custody import payloads
from memconsole.backend.custody.names import custody_name
from memconsole.backend.ledger.state import StateChange
from memconsole.backend.observe.reach import RegionReaching
from memconsole.backend.stores import adopted
from memconsole.backend.verbs import handoff, user_files
from memconsole.backend.verbs.common import free_name, known_region
from memconsole.backend.work import PreparedAction
from memconsole.model import Region, RegionFile, RegionState
from memconsole.units import format_duration, format_size


class RegionReleasing(needs.OwnRegionFds, RegionReaching, Protocol):
    """What ``release`` needs."""


def reserve(desk: user_files.FileMaking, action: Reserve) -> PreparedAction:
    """Set memory aside: ``create`` makes it, ``hold`` puts it into custody, ``show`` makes it a file of a user."""
    work = PreparedAction(action.name, f"region {action.name} is reserved: {format_size(action.size)}")
    free_name(work, desk, action.name, region=True, guest=False)
    made = user_files.given(work, desk, action)
    creation(work, desk, action, file=made.file if made is not None else None)
    if made is not None and not work.refusals:
        user_files.show(work, desk, made)
    return work


def creation(
    work: PreparedAction, desk: needs.OwnRegionFds, action: Reserve, *, file: RegionFile | None = None
) -> None:
    """The steps that make a region, and the refusals that the store has; ``work.change`` gets the region."""
    store = desk.stores.get(action.store)
    if store is None:
        known = ", ".join(desk.stores)
        work.refuse("NoSuchStore", f"there is no store {action.store}", f"stores: {known}", "leave --store out")
        return
    if custody_name(action.name, 0) in desk.custody.names():
        what = f"custody holds memory under the name {action.name}, which the ledger does not know"
        work.refuse("NameInCustody", what, "reserving the name would free that memory", "choose another name")
    promised = desk.promised_bytes()
    work.refusals += store.reserve_refusals(
        action.size, action.page_size, action.node, promised=promised, root=desk.root
    )
    if work.refusals:
        return
    region = Region(
        name=action.name,
        store=action.store,
        size=action.size,
        page_size=action.page_size,
        state=RegionState.RESERVED,
        node=action.node,
        prefault=action.prefault,
        created_ns=time.time_ns(),
        file=file,
    )
    work.aims = msgspec.structs.replace(work.aims, regions=(region,))

    def create() -> None:
        fds = store.reserve_segments(
            action.name, action.size, action.page_size, action.node, prefault=action.prefault, promised=promised
        )
        desk.hold_region(action.name, fds)
        made = msgspec.structs.replace(region, segments=store.segments(fds))
        work.change = msgspec.structs.replace(work.change, regions=(made,))

    def take_back() -> None:
        desk.close_fds(action.name)
        store.discard(action.name)

    def hold() -> None:
        store.describe(desk.fds(action.name), work.change.regions[0])
        for index, fd in enumerate(desk.fds(action.name)):
            payloads.put(desk.custody, custody_name(action.name, index), fd, work.change.regions[0])

    size = f"{format_size(action.size)} in pages of {format_size(action.page_size)}"
    prefault = ", every page given a frame" if action.prefault else ""
    text = f"create the memory of region {action.name}: {size}{prefault}"
    work.step("create", text, create, take_back, "free it")
    work.step(
        "hold",
        f"put it into custody ({desk.custody.label})",
        hold,
        lambda: drop_custody(desk, action.name),
        "take it out of custody",
    )


def release(desk: RegionReleasing, action: Release) -> PreparedAction:
    """Free a region: ``wipe`` zeroes its contents, ``free`` takes its frames from everybody, ``forget`` drops it from
    custody. There is no undo.
    """
    work = PreparedAction(action.region, f"region {action.region} is released")
    left = custody_names(desk, action.region)
    if left and action.region not in desk.state.regions:
        work.text = f"custody freed what it held as region {action.region}: {', '.join(left)}"
        work.step("forget", f"take {', '.join(left)} out of custody", lambda: drop_custody(desk, action.region))
        return work
    region = known_region(work, desk, action.region)
    if region is None:
        return work
    _in_the_way(work, desk, region)
    if work.refusals:
        return work
    if not desk.holds_region(region.name):
        work.text = f"region {region.name} is forgotten; its memory was lost already"
        if left:
            work.text = f"region {region.name} is released, with what was left of it: {', '.join(left)}"

    if region.store == adopted.NAME:
        _let_go_of(work, desk, region)
        return work
    wiped: list[str] = []
    work.step(
        "wipe",
        f"zero its {format_size(region.size)}, as much as was ever touched",
        lambda: wiped.append(_wipe(desk, region)),
    )

    def free() -> None:
        began = time.monotonic_ns()
        desk.free_region(region.name)
        took = format_duration(time.monotonic_ns() - began)
        if wiped[0]:
            work.text = f"region {region.name} is released: {wiped[0]}, freed in {took}"

    work.step("free", f"free its {format_size(region.size)}", free)

    def forget() -> None:
        drop_custody(desk, region.name)
        handoff.finish_sessions(desk)

    work.step("forget", "take it out of custody", forget)
    work.change = StateChange(without_regions=(region.name,))
    return work


def _let_go_of(work: PreparedAction, desk: RegionReleasing, region: Region) -> None:
    """RAM that another program made is neither wiped nor emptied: its file may have a name, and belong to others."""
    held = desk.fds(region.name) if desk.holds_region(region.name) else ()
    named = any(adopted.has_name(fd) for fd in held)
    stays = (
        "its file still has a name, and stays" if named else "the kernel frees it, and zeroes it before others get it"
    )

    def forget() -> None:
        desk.close_fds(region.name)
        drop_custody(desk, region.name)
        handoff.finish_sessions(desk)

    work.text += f"; {stays}"
    work.step("forget", f"take {format_size(region.size)} out of custody: {stays}", forget)
    work.change = StateChange(without_regions=(region.name,))


def _in_the_way(work: PreparedAction, desk: RegionReleasing, region: Region) -> None:
    """Refuse while somebody has the region."""
    grants = desk.state.grants_of(region=region.name)
    if grants:
        ids = ", ".join(f"{grant.id} to {grant.guest}" for grant in grants)
        ends = f"memconsole revoke {grants[0].id}"
        if region.store == adopted.NAME:
            ends = f"memconsole guest let-go {grants[0].guest}"
        work.refuse("Granted", f"region {region.name} is granted", f"its grants: {ids}", ends)
    elif desk.holds_region(region.name) and (mapped := desk.region_reach(region).mapped):
        pids = ", ".join(str(pid) for pid in sorted({over.pid for over in mapped}))
        work.refuse(
            "StillMapped",
            f"region {region.name} is still mapped",
            f"processes {pids} map it without a grant",
            f"have process {mapped[0].pid} unmap it: it may still use the contents",
        )


def _wipe(desk: needs.RegionFds, region: Region) -> str:
    """Zero the contents of a region; how fast, or why not; nothing if its memory is lost."""
    if not desk.holds_region(region.name):
        return ""
    began = time.monotonic_ns()
    zeroed = desk.store_of(region.name).wipe_segments(desk.fds(region.name))
    took = time.monotonic_ns() - began
    if zeroed is None:
        return "the kernel zeroes its frames before they are used again"
    rate = format_size(zeroed * 1_000_000_000 // max(1, took))
    return f"{format_size(zeroed)} zeroed at {rate}/s" if zeroed else "it held nothing"


def drop_custody(desk: needs.InCustody, region: str) -> None:
    """Take a region's segments out of custody, as many as are there."""
    for name in custody_names(desk, region):
        desk.custody.drop(name)


def custody_names(desk: needs.InCustody, region: str) -> list[str]:
    """What custody holds as segments of a region, whether or not the ledger knows it."""
    prefix = custody_name(region, 0)[:-1]
    return [name for name in desk.custody.names() if name.startswith(prefix)]
