"""Users of this host, by name or number, as its passwd and group databases know them."""

from __future__ import annotations

import contextlib
import grp
import pwd
from typing import NamedTuple

from memconsole.errors import GuestError

_LARGEST = (1 << 32) - 2
"""The largest number that a user or group may have; the one after it means none."""


class User(NamedTuple):
    """A user: its number, its group's, and its name, empty where the number has none."""

    uid: int
    gid: int
    name: str


def user(named: str) -> User:
    """The user of this name or number.

    Raises:
        GuestError: there is none.
    """
    if named.isdecimal() and int(named) <= _LARGEST:
        with contextlib.suppress(KeyError):
            found = pwd.getpwuid(int(named))
            return User(found.pw_uid, found.pw_gid, found.pw_name)
        return User(int(named), int(named), "")
    try:
        found = pwd.getpwnam(named)
    except (KeyError, ValueError):
        raise GuestError(
            f"there is no user {named}", "this host does not know the name", "getent passwd lists them"
        ) from None
    return User(found.pw_uid, found.pw_gid, found.pw_name)


def group(named: str) -> int:
    """The number of the group of this name or number.

    Raises:
        GuestError: there is none.
    """
    if named.isdecimal() and int(named) <= _LARGEST:
        return int(named)
    try:
        return grp.getgrnam(named).gr_gid
    except (KeyError, ValueError):
        raise GuestError(
            f"there is no group {named}", "this host does not know the name", "getent group lists them"
        ) from None
