"""Who may do what on the control socket: by the credentials the kernel says its peer has."""

from __future__ import annotations

import enum
import grp
import os

from memconsole.backend.wire.loop import Peer
from memconsole.errors import UsageError

OPERATORS = "memconsole"
VIEWERS = "memconsole-view"


class Role(enum.IntEnum):
    """What a peer may do; each includes the one before."""

    NOBODY = 0
    VIEWER = 1
    OPERATOR = 2


class Roles:
    """Root, the control process's own user and the operator group act; the viewer group reads; nobody else is served.

    Groups are looked up once: no name service can hold up a connection. A default group that does not exist has no
    members; one that was asked for by name must exist.

    Raises:
        UsageError: a group asked for does not exist.
    """

    def __init__(self, operators: str | None = None, viewers: str | None = None) -> None:
        self._me = os.geteuid()
        self._operators = _group(operators, OPERATORS)
        self._viewers = _group(viewers, VIEWERS)

    def of(self, peer: Peer) -> Role:
        """The role of a peer."""
        groups = {peer.gid, *peer.groups}
        if peer.uid in {0, self._me} or self._operators in groups:
            return Role.OPERATOR
        if self._viewers in groups:
            return Role.VIEWER
        return Role.NOBODY


def _group(asked: str | None, default: str) -> int | None:
    try:
        return grp.getgrnam(asked or default).gr_gid
    except KeyError:
        if asked is not None:
            raise UsageError(f"there is no group {asked!r}", "", f"create it: groupadd --system {asked}") from None
        return None
