"""``reserve --path``: a region that is a file of a user of this host, for any program that this user starts.

The user is a guest without a program of its own (``Guest.is_user``), made with its first file; each file is a grant of
a whole region to it. So a file is taken back like any grant, by ``revoke``, and given again by ``map``.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from memconsole.actions import NAME, Reserve
from memconsole.backend import needs
from memconsole.backend.ledger.state import State
from memconsole.backend.stores import files
from memconsole.backend.verbs import users
from memconsole.backend.work import PreparedAction
from memconsole.errors import GuestError
from memconsole.model import Access, Grant, GrantState, Guest, GuestKind, GuestState, Region, RegionFile, Service
from memconsole.units import format_size

_PATH_MOST = 512
_WRITE = 0o222


class FileMaking(needs.OwnRegionFds, needs.GrantFiles, Protocol):
    """What making a user's file needs."""


class Given(NamedTuple):
    """What ``reserve --path`` makes besides the region."""

    file: RegionFile
    guest: Guest
    grant: Grant


def given(work: PreparedAction, desk: FileMaking, action: Reserve) -> Given | None:
    """The user, the file and the grant that an Action asks for; None where it asks for no file, or is refused."""
    if not action.path:
        if action.owner or action.mode or action.quota is not None:
            what = "an owner, a mode or a quota is of a file"
            work.refuse("NoPath", what, "no --path says which file the region is to be", "say --path FILE, or none")
        return None
    mode = _mode(work, action)
    _path(work, desk.state, action.path)
    _able(work, desk, action)
    try:
        who, group = _owner(action)
    except GuestError as error:
        work.refuse("NoUser", error.what, error.why, error.remedy)
        return None
    guest = _guest(work, desk.state, who, action.quota)
    _quota(work, desk.state, guest, action.size)
    if work.refusals or guest.service is None:
        return None
    grant = Grant(
        id=f"g{desk.state.next_grant}",
        region=action.name,
        guest=guest.name,
        offset=0,
        length=action.size,
        access=Access.RW if mode & _WRITE else Access.RO,
        state=GrantState.OFFERED,
        created_ns=time.time_ns(),
    )
    return Given(RegionFile(action.path, who.uid, group, mode), guest, grant)


def show(work: PreparedAction, desk: FileMaking, made: Given) -> None:
    """The step that makes the file a user's; the mount shows it when the ledger knows of it."""
    file, guest = made.file, made.guest
    work.aims = replace(work.aims, guests=(guest,), grants=(made.grant,))
    path = file.path if desk.mount is None else desk.mount.file_path(file.path)
    work.text += f", as {path} of {guest.name}"

    def do() -> None:
        work.change = replace(work.change, guests=(guest,), grants=(made.grant,))

    text = f"make it {path}, of {guest.name}, with permissions {file.mode:04o} ({made.grant.id})"
    work.step("show", text, do)


def _mode(work: PreparedAction, action: Reserve) -> int:
    said = action.mode or "0600"
    if re.fullmatch("0?[0-7]{3}", said) and not int(said, 8) & 0o111:
        return int(said, 8)
    why = "permissions are three octal digits, and no program is run from a region"
    work.refuse("BadMode", f"{said!r} cannot be the permissions of a file", why, "write --mode 0600, or 0640")
    return 0


def _path(work: PreparedAction, state: State, path: str) -> None:
    names = path.split("/")
    if len(path) > _PATH_MOST or not all(re.fullmatch(r"[A-Za-z0-9._-]{1,255}", name) for name in names):
        why = f"it is names between slashes, of letters, digits, dots, dashes and underscores, {_PATH_MOST} at most"
        work.refuse("BadPath", f"{path!r} cannot be a file of the mount", why, "write --path db/items")
        return
    if {".", ".."} & set(names):
        why = "a path leads down from files/ on the mount, by names alone"
        work.refuse("BadPath", f"{path!r} cannot be a file of the mount", why, "write --path db/items")
        return
    for other in state.regions.values():
        theirs = other.file.path if other.file is not None else ""
        if theirs and (path == theirs or path.startswith(f"{theirs}/") or theirs.startswith(f"{path}/")):
            what = f"{path} is there already" if path == theirs else f"{path} and {theirs} cannot both be files"
            work.refuse("PathTaken", what, f"region {other.name} is {theirs}", "choose another path")
            return


def _able(work: PreparedAction, desk: FileMaking, action: Reserve) -> None:
    """Refuse what could not be shown as a file."""
    store = desk.stores.get(action.store)
    if store is not None and not store.CUTS:
        why = "the kernel shows files through the mount, and no devices"
        work.refuse("NoFile", f"a region of store {action.store} cannot be a file", why, "--store memfd, or dax")
    if action.size > files.SEGMENT:
        why = f"the mount shows regions of one segment, {format_size(files.SEGMENT)} at most"
        work.refuse("NoFile", f"{format_size(action.size)} cannot be one file", why, "reserve several files")
    if desk.mount is None:
        why = "this control process shows no files"
        work.refuse("NoMount", f"{action.path} would not be shown", why, "memconsole serve --mount")


def _owner(action: Reserve) -> tuple[users.User, int]:
    name, colon, group = action.owner.partition(":")
    who = users.user(name or "0")
    return who, users.group(group) if colon else who.gid


def owner_again(state: State, region: Region, guest: str) -> Guest | None:
    """The user whose file a region is, by the name of a guest that the ledger does not know (any more)."""
    file = region.file
    if file is None or guest in state.guests:
        return None
    who = users.user(str(file.user))
    return _new(who, None) if guest == _name(who) else None


def _name(who: users.User) -> str:
    """What the guest that a user is is called."""
    name = f"user-{who.name or who.uid}"
    return name if re.fullmatch(NAME, name) else f"user-{who.uid}"


def _new(who: users.User, quota: int | None) -> Guest:
    service = Service(user=who.uid, group=who.gid, quota=quota)
    return Guest(_name(who), GuestKind.PROCESS, GuestState.GONE, None, created_ns=time.time_ns(), service=service)


def _guest(work: PreparedAction, state: State, who: users.User, quota: int | None) -> Guest:
    """The guest that a user is: the one that is known, or a new one."""
    name = _name(who)
    known = next((each for each in state.guests.values() if each.is_user and _uid(each) == who.uid), None)
    if known is None and name in state.guests:
        what = f"user {who.name or who.uid} cannot have files: there is a guest {name} already"
        work.refuse("NameTaken", what, "a user is a guest of that name", f"memconsole guest stop {name}")
    if known is not None and known.service is not None:
        return known if quota is None else replace(known, service=replace(known.service, quota=quota))
    return _new(who, quota)


def _uid(guest: Guest) -> int | None:
    return guest.service.user if guest.service is not None else None


def _quota(work: PreparedAction, state: State, guest: Guest, size: int) -> None:
    quota = guest.service.quota if guest.service is not None else None
    has = sum(grant.length for grant in state.grants_of(guest=guest.name))
    if quota is not None and has + size > quota:
        what = f"{guest.name} may have no more: {format_size(has)} and {format_size(size)} are more than its quota"
        why = f"its files may be {format_size(quota)} altogether"
        work.refuse("OverQuota", what, why, "revoke one of its grants, or say a larger --quota")
