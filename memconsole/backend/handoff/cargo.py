"""What a handoff carries: which session of live update preserves which regions, and which are found where they are."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from memconsole.backend import needs
from memconsole.backend.handoff import luo
from memconsole.backend.steps import Step
from memconsole.errors import MemconsoleError, NotFound
from memconsole.model import Region


@dataclass(frozen=True)
class SessionContents:
    """What one session carries: regions of one guest, or one region of several guests or none.

    ``by_itself``: no session carries them, and ``session`` is where memconsole-resume finds them (``arena:NAME``).
    """

    session: str
    regions: tuple[Region, ...]
    by_itself: bool = False

    @property
    def size(self) -> int:
        """Bytes of all its regions."""
        return sum(region.size for region in self.regions)


def cargoes(desk: needs.RegionFds, without: Collection[str] = ()) -> list[SessionContents]:
    """The regions whose memory is held and comes along, by the session that is to carry each, or where it is found;
    ``without`` those that one of these guests has.
    """
    found: dict[str, list[Region]] = {}
    stays: dict[str, list[Region]] = {}
    for region in desk.state.regions.values():
        guests = {grant.guest for grant in desk.state.grants_of(region=region.name)}
        if not desk.holds_region(region.name) or guests & set(without):
            continue
        if desk.store_of(region.name).CARRIED:
            owner = guests.pop() if len(guests) == 1 else f"={region.name}"
            found.setdefault(luo.session_name(owner), []).append(region)
        elif place := place_of(desk, region.name):
            stays.setdefault(place, []).append(region)
    carried = [SessionContents(session, tuple(regions)) for session, regions in found.items()]
    return [*carried, *(SessionContents(place, tuple(regions), by_itself=True) for place, regions in stays.items())]


def place_of(desk: needs.RegionFds, region: str) -> str:
    """Where memconsole-resume finds a region by itself; empty where it does not."""
    store = desk.store_of(region)
    places = {store.place(fd) for fd in desk.fds(region)}
    return places.pop() if len(places) == 1 else ""


def held_sizes(desk: needs.InCustody, names: Iterable[str]) -> list[int]:
    """The sizes in bytes of what custody holds under these names."""
    sizes = []
    for name in names:
        fd, _ = desk.custody.get(name)
        sizes.append(os.fstat(fd).st_size)
        os.close(fd)
    return sizes


def leave(desk: needs.Stored, place: str, files: Mapping[int, int]) -> None:
    """Leave files, by their tokens, where memconsole-resume of the next kernel finds them.

    Raises:
        KernelRefused: there is no room. NotFound: no store has such a place.
    """
    for store in desk.stores.values():
        if any(each.place == place for each in store.carriers()):
            return store.leave(place, files)
    raise NotFound(f"there is no {place}", "no store of this host has it any more", "memconsole arena check")


def take_back(desk: needs.Stored) -> None:
    """Have what a handoff left with a store mean nothing any more; raises :class:`KernelRefused`."""
    for store in desk.stores.values():
        store.take_back()


def hold_still(desk: needs.Stored, *, on: bool) -> None:
    """Have every store's memory say all that it is to say, and be written to no more, or let it go on.

    Raises:
        KernelRefused: one cannot be.
    """
    try:
        for store in desk.stores.values():
            store.hold_still(on=on)
    except MemconsoleError:
        if on:
            hold_still(desk, on=False)
        raise


def still(desk: needs.Stored, cargo: Iterable[SessionContents], road: str) -> Iterator[Step]:
    """The last step before a jump where something lies in an arena: memconsole writes nothing there from then on."""
    if road or any(each.by_itself for each in cargo):
        yield Step(
            "still",
            "write down all that arenas say, and hold them still",
            lambda: hold_still(desk, on=True),
            lambda: hold_still(desk, on=False),
            "let them go on",
        )
