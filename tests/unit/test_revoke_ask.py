"""What a revoke says of the guest it asked: only one that answered has said that it unmapped a grant."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.desks import Facts, Live, desk_of, grant, guest, region

from memconsole.backend.revoke.ladder import Ladder
from memconsole.errors import GuestError
from memconsole.model import GuestKind, Rung


@pytest.mark.parametrize(
    ("live", "why"),
    [
        (Live("db"), "ask: guest db said that it unmapped it"),
        (Live("db", has_agent=False), "ask: guest db has no agent to unmap it"),
        (Live("db", GuestKind.QEMU), "ask: guest db has no agent to unmap it"),
        (None, "ask: its guest is gone"),
    ],
)
def test_only_a_guest_that_answered_said_it_did(tmp_path: Path, live: Live | None, why: str) -> None:
    lives = () if live is None else (live,)
    facts = Facts((region(),), (guest(),), (grant(),), live=lives, reaching=((4000,),))
    with desk_of(tmp_path, facts) as desk, pytest.raises(GuestError) as caught:
        desk.carry(Ladder(desk, grant(), 0, Rung.ASK).climb())
    assert caught.value.code == "StillMapped"
    assert caught.value.why == f"{why}; its memfd is held by 4000"
    if live is not None:
        assert live.did == (["unmap g1"] if live.kind is GuestKind.PROCESS else [])
