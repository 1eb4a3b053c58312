"""Every way into a grant that was opened by its path, before a revoke and after it, for each rung of the ladder."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostile import SECRET, Accomplice, accomplices, no_fresh_files
from support.mounted import SIZE, Place, patience, places, unexpected
from support.mounts import NOBODY, Attacker, hostile
from support.waiting import until

from memconsole import actions as do
from memconsole.model import RevokeOutcome, RevokeReport, Rung

WORD = SECRET.decode()
WAYS = ("load", "read", "map-again", "splice", "child-load")
"""Ways to 8 bytes of the contents."""
NEW = ("open", "open-ro")
"""Ways to the file by its path."""


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


@pytest.fixture
def built(place: Place) -> Path:
    return hostile(place.service.directory)


@pytest.fixture
def accomplice() -> Iterator[Accomplice]:
    with accomplices() as (found, _):
        yield found


@pytest.fixture
def attacker(place: Place, built: Path, accomplice: Accomplice) -> Iterator[Attacker]:
    """A guest of another user, which has its file open, and another descriptor of it in a socket's queue."""
    path = place.path("web", "pool")
    with Attacker(built, path, sockets=[accomplice.socket.fileno()]) as attacker:
        assert attacker.do("open") == "ENOENT", "it runs, as its user"
        place.client.apply(do.Reserve("pool", SIZE))
        place.client.apply(do.GuestAttach("web", attacker.pid))
        place.client.apply(do.Map("pool", "web"))
        assert path.stat().st_uid == NOBODY
        with place.owners("pool").open("r+b", buffering=0) as file:
            file.write(SECRET)
        assert [attacker.do(order) for order in ("open", "post", "open")] == ["ok"] * 3
        yield attacker


def spread(attacker: Attacker, accomplice: Accomplice) -> None:
    """It maps the file, and so do a child of it and somebody whom it sent the descriptor; all of them read it."""
    assert [attacker.do(order) for order in ("map", "fork", f"give {accomplice.socket.fileno()}")] == ["ok"] * 3
    assert [accomplice.do("take"), accomplice.do("map")] == [WORD] * 2
    assert {way: attacker.do(way) for way in WAYS} == dict.fromkeys(WAYS, f"ok {WORD}")
    assert [attacker.do(way) for way in (*NEW, "open", "self-fd")] == ["ok"] * 4


def revoke(place: Place, at_most: Rung) -> RevokeReport:
    report = place.client.apply(do.Revoke("g1", within=patience(at_most), at_most=at_most)).revoke
    assert report is not None
    shown = place.shown()
    assert shown.grants == ()
    assert not unexpected(shown)
    with place.owners("pool").open("r+b", buffering=0) as file:
        assert file.read(8) == SECRET, "the contents are whole"
        file.seek(0)
        file.write(b"LATER-02")
    return report


def shut_out(place: Place, attacker: Attacker, *ways: str) -> None:
    """By the file it has, the one that waited in a socket, and the path: no contents, and nothing is written."""
    for another in ("open", "fetch"):
        assert attacker.do(another) in ({"ok"} if another == "fetch" else {"ENOENT", "EACCES"})
        said = {way: attacker.do(way) for way in (*ways, "store", "write", "grow", "allocate", "self-fd", "open-ro")}
        assert not {way for way, what in said.items() if WORD in what or "LATER" in what}, said
        assert said["open-ro"] in {"ENOENT", "EACCES"}
    with place.owners("pool").open("rb", buffering=0) as file:
        assert file.read(8) == b"LATER-02"


def no_way_by_path(place: Place, built: Path) -> None:
    for uid in (NOBODY, 0):
        with Attacker(built, place.path("web", "pool"), uid) as other:
            assert {other.do(way) for way in NEW} <= {"ENOENT", "EACCES"}


def test_ask_ends_what_is_left_of_one_that_gave_it_back(place: Place, built: Path, attacker: Attacker) -> None:
    """It has no mapping and no descriptor that shows, and one that does not."""
    assert [attacker.do(order) for order in ("map", "load", "unmap", "close")] == ["ok", f"ok {WORD}", "ok", "ok"]
    report = revoke(place, Rung.ASK)
    assert (report.rung, report.outcome) == (Rung.ASK, RevokeOutcome.PROVED), report
    no_way_by_path(place, built)
    shut_out(place, attacker, "map", "load", "read", "map-again", "splice")


def test_copy_ends_every_way(place: Place, built: Path, attacker: Attacker, accomplice: Accomplice) -> None:
    spread(attacker, accomplice)
    report = revoke(place, Rung.COPY)
    assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED), report
    no_way_by_path(place, built)
    assert [attacker.do(way) for way in ("load", "child-load", "store")] == ["SIGBUS"] * 3
    shut_out(place, attacker, *WAYS)
    assert accomplice.do("look") == ""
    until(lambda: accomplice.ended() == -signal.SIGBUS, "there is nothing behind what it mapped")


def test_kill_ends_everybody_who_has_a_way(
    place: Place, built: Path, attacker: Attacker, accomplice: Accomplice
) -> None:
    """Where no memory can be had to move the contents to."""
    spread(attacker, accomplice)
    with no_fresh_files():
        place.restart()
    report = revoke(place, Rung.KILL)
    assert (report.rung, report.outcome) == (Rung.KILL, RevokeOutcome.CUT), report
    assert str(attacker.pid) in report.note
    assert str(accomplice.pid) in report.note
    assert accomplice.ended() == attacker.ends() == -signal.SIGKILL
    no_way_by_path(place, built)
