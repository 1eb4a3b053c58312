"""``reserve --path`` on a real mount: a file of a user, through restarts, until it is taken back, and again."""

from __future__ import annotations

import pwd
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import controls
from support.mounted import SIZE, Place, places, unexpected
from support.mounts import NOBODY

from memconsole import actions as do
from memconsole.errors import Refused
from memconsole.model import GuestState, RevokeOutcome, Rung

STRANGER = 54321
USER = f"user-{pwd.getpwuid(NOBODY).pw_name}"


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


def reserved(place: Place, name: str = "items", **words: object) -> Path:
    path = f"db/{name}"
    place.client.apply(do.Reserve(name, SIZE, path=path, owner=str(NOBODY), **words))  # type: ignore[arg-type]
    return place.point / "files" / path


def test_a_users_file_is_opened_by_that_user_alone_and_outlives_the_service(place: Place) -> None:
    path = reserved(place)
    seen = path.stat()
    assert (seen.st_uid, seen.st_gid, seen.st_mode & 0o7777) == (NOBODY, pwd.getpwuid(NOBODY).pw_gid, 0o600)
    assert seen.st_size == SIZE
    stranger, user = place.user(STRANGER), place.user()
    assert stranger.do(f"open {path}") == "Permission denied"
    for word in (f"open {path}", "map", "write hello!"):
        assert user.do(word) == "done"
    shown = place.shown()
    assert controls.region(shown, "items").seen.mappers == (user.pid,)  # type: ignore[union-attr]
    assert controls.guest(shown, USER).state is GuestState.RUNNING
    assert not unexpected(shown)
    place.restart()
    place.kill_server()
    assert user.do("write again!") == "done"
    place.mounted_anew(0)
    shown = place.shown()
    assert path.stat().st_uid == NOBODY
    assert not unexpected(shown)
    assert not [each for each in shown.findings if each.subject in {"items", USER}]
    other = place.user()
    for word, said in ((f"open {path}", "done"), ("map", "done"), ("read", "again!")):
        assert other.do(word) == said


def test_it_is_taken_back_with_its_contents_and_given_again_at_the_same_path(place: Place) -> None:
    path = reserved(place)
    user = place.user()
    for word in (f"open {path}", "map", "write hello!"):
        assert user.do(word) == "done"
    with pytest.raises(Refused, match="is granted"):
        place.client.apply(do.Release("items"))
    report = place.revoke()
    assert (report.rung, report.outcome) == (Rung.COPY, RevokeOutcome.PROVED)
    assert user.do("read") == ""
    assert user.finish() == -signal.SIGBUS
    assert not path.exists()
    assert not unexpected(place.shown())
    place.client.apply(do.Map("items", USER))
    other = place.user()
    for word, said in ((f"open {path}", "done"), ("map", "done"), ("read", "hello!")):
        assert other.do(word) == said
    assert other.finish() == 0
    place.revoke("g2")
    place.client.apply(do.Release("items"))
    assert not path.parent.exists()


def test_a_group_may_read_where_the_permissions_say_so_and_a_user_has_a_quota(place: Place) -> None:
    path = reserved(place, mode="0640", quota=2 * SIZE)
    assert path.stat().st_mode & 0o777 == 0o640
    reserved(place, "more")
    with pytest.raises(Refused, match="may have no more"):
        reserved(place, "most")
    place.revoke("g2")
    reserved(place, "most")
    assert sorted(each.name for each in path.parent.iterdir()) == ["items", "most"]
