"""Who may do what on the control socket: by the credentials the kernel says its peer has."""

from __future__ import annotations

import contextlib
import enum
import grp
import os
import time
from pathlib import Path

from memconsole import decoding
from memconsole.backend.peers.peer import Peer
from memconsole.errors import UsageError

OPERATORS = "memconsole"
VIEWERS = "memconsole-view"
LOOK_S = 1.0
"""Seconds between two looks for a default group that was not there."""


class Role(enum.IntEnum):
    """What a peer may do; each includes the one before."""

    NOBODY = 0
    VIEWER = 1
    OPERATOR = 2


class Roles:
    """Root, the control process's own user and the operator group act; the viewer group reads; nobody else is served.

    Groups are looked up once: no name service can hold up a connection. A default group that does not exist then has no
    members until ``groups`` (a local file, read at most once a second) has it; one that was asked for must exist.

    Raises:
        UsageError: a group asked for does not exist.
    """

    def __init__(
        self, operators: str | None = None, viewers: str | None = None, *, groups: Path = Path("/etc/group")
    ) -> None:
        self._groups = groups
        self._looked = 0.0
        self._me = os.geteuid()
        self._operators = _group(operators, OPERATORS)
        self._viewers = _group(viewers, VIEWERS)

    def of(self, peer: Peer) -> Role:
        """The role of a peer."""
        if None in {self._operators, self._viewers}:
            self._refresh_groups()
        groups = {peer.gid, *peer.groups}
        if peer.uid in {0, self._me} or self._operators in groups:
            return Role.OPERATOR
        if self._viewers in groups:
            return Role.VIEWER
        return Role.NOBODY

    def _refresh_groups(self) -> None:
        """Take in the default groups that were made since."""
        now = time.monotonic()
        if now < self._looked + LOOK_S:
            return
        self._looked = now
        with contextlib.suppress(OSError):
            rows = [row.split(":") for row in decoding.text(self._groups.read_bytes()).splitlines()]
            made = {row[0]: int(row[2]) for row in rows if len(row) == 4 and row[2].isdecimal()}
            self._operators = made.get(OPERATORS) if self._operators is None else self._operators
            self._viewers = made.get(VIEWERS) if self._viewers is None else self._viewers


def _group(asked: str | None, default: str) -> int | None:
    try:
        return grp.getgrnam(asked or default).gr_gid
    except KeyError:
        if asked is not None:
            raise UsageError(
                f"there is no group {asked!r}", "the system does not know it", f"create it: groupadd --system {asked}"
            ) from None
        return None
