"""``reserve`` and ``release``: a region comes into being in custody, and goes with its frames."""

from __future__ import annotations

import time

import msgspec

from memconsole.actions import Release, Reserve
from memconsole.backend.desk import Desk, custody_name
from memconsole.backend.state import Change
from memconsole.backend.stores import memfd
from memconsole.backend.verbs import handoff
from memconsole.backend.verbs.common import free_name, known_region, not_frozen
from memconsole.backend.verbs.work import Work
from memconsole.model import Region, RegionState
from memconsole.units import format_duration, format_size


def reserve(desk: Desk, action: Reserve) -> Work:
    """Set memory aside: ``create`` makes it, ``hold`` puts it into custody."""
    work = Work(action.name, f"region {action.name} is reserved: {format_size(action.size)}")
    free_name(work, desk, action.name, region=True, guest=False)
    creation(work, desk, action)
    return work


def creation(work: Work, desk: Desk, action: Reserve) -> None:
    """The steps that make a region, and the refusals that the store has; ``work.change`` gets the region."""
    if action.store != memfd.NAME:
        work.refuse("NoSuchStore", f"there is no store {action.store}", f"stores: {memfd.NAME}", "leave --store out")
    promised = desk.promised()
    work.refusals += memfd.check(action.size, action.page_size, action.node, promised=promised)
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
    )
    work.aims = msgspec.structs.replace(work.aims, regions=(region,))

    def create() -> None:
        fds = memfd.reserve(
            action.name, action.size, action.page_size, action.node, prefault=action.prefault, promised=promised
        )
        desk.hold(action.name, fds)
        made = msgspec.structs.replace(region, segments=memfd.segments(fds))
        work.change = msgspec.structs.replace(work.change, regions=(made,))

    def hold() -> None:
        payload = msgspec.json.encode(work.change.regions[0])
        for index, fd in enumerate(desk.fds(action.name)):
            desk.custody.put(custody_name(action.name, index), fd, payload)

    size = f"{format_size(action.size)} in pages of {format_size(action.page_size)}"
    prefault = ", every page put in place" if action.prefault else ""
    work.step(
        "create",
        f"make the memory of region {action.name}: {size}{prefault}",
        create,
        lambda: desk.let_go(action.name),
        "give it back",
    )
    work.step(
        "hold",
        f"put it into custody ({desk.custody.label})",
        hold,
        lambda: drop_custody(desk, action.name),
        "take it out of custody",
    )


def release(desk: Desk, action: Release) -> Work:
    """Free a region: ``wipe`` zeroes its contents, ``free`` takes its frames from everybody, ``forget`` drops it from
    custody. There is no undo.
    """
    work = Work(action.region, f"region {action.region} is released")
    region = known_region(work, desk, action.region)
    if region is None:
        return work
    not_frozen(work, region, "released")
    grants = desk.state.grants_of(region=region.name)
    if grants:
        ids = ", ".join(f"{grant.id} to {grant.guest}" for grant in grants)
        work.refuse("Granted", f"region {region.name} is granted", ids, f"memconsole revoke {grants[0].id}")
    elif not desk.has(region.name):
        work.text = f"region {region.name} is forgotten; its memory was lost already"
    elif mapped := desk.reach(region).mapped:
        pids = ", ".join(str(pid) for pid in sorted({over.pid for over in mapped}))
        work.refuse(
            "StillMapped",
            f"region {region.name} is still mapped",
            f"processes {pids} map it without a grant",
            f"end process {mapped[0].pid} first",
        )
    if work.refusals:
        return work

    wiped: list[str] = []
    work.step(
        "wipe",
        f"zero its {format_size(region.size)}, as much as was ever touched",
        lambda: wiped.append(_wipe(desk, region)),
    )

    def free() -> None:
        began = time.monotonic_ns()
        desk.free(region.name)
        took = format_duration(time.monotonic_ns() - began)
        if wiped[0]:
            work.text = f"region {region.name} is released: {wiped[0]}, freed in {took}"

    work.step("free", f"free its {format_size(region.size)} for everybody", free)

    def forget() -> None:
        drop_custody(desk, region.name)
        handoff.tidy(desk)

    work.step("forget", "take it out of custody", forget)
    work.change = Change(without_regions=(region.name,))
    return work


def _wipe(desk: Desk, region: Region) -> str:
    """Zero the contents of a region; how fast, or why not; nothing if its memory is lost."""
    if not desk.has(region.name):
        return ""
    began = time.monotonic_ns()
    zeroed = memfd.wipe(desk.fds(region.name))
    took = time.monotonic_ns() - began
    if zeroed is None:
        return "its frames are zeroed by the kernel before anybody gets them"
    rate = format_size(zeroed * 1_000_000_000 // max(1, took))
    return f"{format_size(zeroed)} zeroed at {rate}/s" if zeroed else "it held nothing"


def drop_custody(desk: Desk, region: str) -> None:
    """Take a region's segments out of custody, as many as are there."""
    prefix = custody_name(region, 0)[:-1]
    for name in desk.custody.names():
        if name.startswith(prefix):
            desk.custody.drop(name)
