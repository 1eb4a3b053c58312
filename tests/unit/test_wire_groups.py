"""Groups that are made while the service runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from memconsole.backend.peers.peer import Peer
from memconsole.backend.wire import roles
from memconsole.backend.wire.roles import Role, Roles


def test_a_default_group_counts_from_when_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roles, "OPERATORS", "memconsole-made-later")
    monkeypatch.setattr(roles, "VIEWERS", "memconsole-view-made-later")
    monkeypatch.setattr(roles, "LOOK_S", 0.0)
    groups = tmp_path / "group"
    mine = Roles(groups=groups)
    operator, viewer = (Peer(1, 7001, gid, ()) for gid in (7101, 7102))
    assert {mine.of(operator), mine.of(viewer)} == {Role.NOBODY}
    groups.write_bytes(b"root:x:0:\n\xff\nmemconsole-made-later:x:7101:\nmemconsole-view-made-later:x:7102:a,b\n")
    assert (mine.of(operator), mine.of(viewer)) == (Role.OPERATOR, Role.VIEWER)
    groups.unlink()
    assert mine.of(operator) is Role.OPERATOR
