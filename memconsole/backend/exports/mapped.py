"""What is mapped of an export: the files on the mount by their names and inodes, and mappings that lead nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from memconsole.backend.ledger.state import State
    from memconsole.model import Grant, ProcessId, Region, RegionFile


class FuseAlias(NamedTuple):
    """Another file through which a region's frames are mapped; ``base`` is where in the region it begins, in bytes.

    Its mappings show this device and inode. ``path`` is what it is called on the mount; who maps it may have it under
    another name, in another namespace.
    """

    region: str
    device: int
    inode: int
    base: int
    path: str


def path_of(grant: Grant, state: State) -> str:
    """What the file of a grant is called on the mount, below its top."""
    file = file_of(grant, state)
    return f"guests/{grant.guest}/ram/{grant.region}" if file is None else path_of_file(file)


def path_of_file(file: RegionFile) -> str:
    """What a user's file is called there."""
    return f"files/{file.path}"


def file_of(grant: Grant, state: State) -> RegionFile | None:
    """The user's file that a grant is: of a region that was reserved as one, to the user whose it is."""
    region, guest = state.regions.get(grant.region), state.guests.get(grant.guest)
    file = region.file if region is not None else None
    service = guest.service if guest is not None and guest.is_user else None
    return file if file is not None and service is not None and service.user == file.user else None


def user_files(state: State) -> dict[str, RegionFile]:
    """The users' files that there are, by region: of those that were reserved as one, which few are, the granted."""
    owned = {region.name for region in state.regions.values() if region.file is not None}
    found = ((each.region, file_of(each, state)) for each in state.grants.values() if each.region in owned)
    return {name: file for name, file in found if file is not None}


def is_whole(grant: Grant, region: Region) -> bool:
    """Whether it grants all of the region: the mount shows no other grants."""
    return grant.offset == 0 and grant.length == region.size


class BlockedMapping(NamedTuple):
    """A mapping that is there and leads nowhere: every access waits for an answer that is never given."""

    process: ProcessId
    start: int
    end: int
