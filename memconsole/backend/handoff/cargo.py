"""What a handoff carries: which session of live update preserves which regions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from memconsole.backend import needs
from memconsole.backend.handoff import luo
from memconsole.model import Region


@dataclass(frozen=True)
class SessionContents:
    """What one session carries: regions of one guest, or one region of several guests or none."""

    session: str
    regions: tuple[Region, ...]

    @property
    def size(self) -> int:
        """Bytes of all its regions."""
        return sum(region.size for region in self.regions)


def cargoes(desk: needs.RegionFds, without: Collection[str] = ()) -> list[SessionContents]:
    """The regions whose memory is held and that do not survive by themselves, by the session that is to carry each;
    ``without`` those that one of these guests has.
    """
    found: dict[str, list[Region]] = {}
    for region in desk.state.regions.values():
        carried = desk.holds_region(region.name) and desk.store_of(region.name).CARRIED
        guests = {grant.guest for grant in desk.state.grants_of(region=region.name)}
        if carried and not guests & set(without):
            owner = guests.pop() if len(guests) == 1 else f"={region.name}"
            found.setdefault(luo.session_name(owner), []).append(region)
    return [SessionContents(session, tuple(regions)) for session, regions in found.items()]
