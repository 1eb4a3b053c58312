"""``reserve --path``: a region that is a file of a user of this host."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.desks import Desk, M, Mount, desks, grant, guest, region

from memconsole.actions import Map, Reserve
from memconsole.backend import steps
from memconsole.backend.exports import mapped, mount_parts
from memconsole.backend.verbs import grants, regions
from memconsole.model import Access, Grant, Guest, GuestKind, GuestState, Region, RegionFile, Service

ROOT = pwd.getpwuid(0).pw_name
USER = Guest("user-1234567", GuestKind.PROCESS, GuestState.GONE, None, service=Service(user=1234567, group=1234567))
OWNED = replace(region(), file=RegionFile("db/items", 1234567, 1234567))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desks(tmp_path, regions=(OWNED,), guests=(guest(), USER)) as made:
        made.mount = Mount()
        yield made


def reserved(desk: Desk, **words: object) -> tuple[Region, Guest, Grant]:
    work = regions.reserve(desk, Reserve("new", 8 * M, path="db/new", **words))  # type: ignore[arg-type]
    assert not work.refusals
    assert [step.id for step in work.steps] == ["create", "hold", "show"]
    desk.carry(steps.run("reserve", work.steps))
    return work.change.regions[0], work.change.guests[0], work.change.grants[0]


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        ({"owner": "root"}, ["NoPath"]),
        ({"mode": "0600"}, ["NoPath"]),
        ({"quota": 4 * M}, ["NoPath"]),
        ({"path": "/etc/passwd"}, ["BadPath"]),
        ({"path": "../items"}, ["BadPath"]),
        ({"path": "a//b"}, ["BadPath"]),
        ({"path": "a/./b"}, ["BadPath"]),
        ({"path": "a b"}, ["BadPath"]),
        ({"path": "a\n"}, ["BadPath"]),
        ({"path": "x/" * 300 + "x"}, ["BadPath"]),
        ({"path": "db/items"}, ["PathTaken"]),
        ({"path": "db/items/more"}, ["PathTaken"]),
        ({"path": "db"}, ["PathTaken"]),
        ({"path": "new", "mode": "0700"}, ["BadMode"]),
        ({"path": "new", "mode": "rw"}, ["BadMode"]),
        ({"path": "new", "mode": "4600"}, ["BadMode"]),
        ({"path": "new", "owner": "nobody-is-called-so"}, ["NoUser"]),
        ({"path": "new", "owner": ":no-such-group"}, ["NoUser"]),
        ({"path": "new", "owner": "4294967295"}, ["NoUser"]),
        ({"path": "new", "quota": 4 * M}, ["OverQuota"]),
        ({"path": "new", "store": "raw"}, ["NoFile"]),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_made_is_refused_by_name(desk: Desk, words: dict[str, object], codes: list[str]) -> None:
    work = regions.reserve(desk, Reserve("new", 8 * M, **words))  # type: ignore[arg-type]
    assert [each.code for each in work.refusals][: len(codes)] == codes
    assert not work.steps
    assert all(each.why and each.remedy for each in work.refusals)


def test_no_file_is_made_where_nobody_would_see_it(desk: Desk) -> None:
    desk.mount = None
    (refusal,) = regions.reserve(desk, Reserve("new", 8 * M, path="new")).refusals
    assert (refusal.code, refusal.remedy) == ("NoMount", "memconsole serve --mount")


def test_a_file_is_a_grant_of_the_whole_region_to_its_user(desk: Desk) -> None:
    made, user, granted = reserved(desk, owner="7654321:5", mode="640")
    assert made.file == RegionFile("db/new", 7654321, 5, 0o640)
    assert (user.name, user.is_user, user.pid) == ("user-7654321", True, None)
    assert (granted.region, granted.guest, granted.length) == ("new", user.name, 8 * M)
    assert granted.access is Access.RW
    assert os.fstat(desk.fds("new")[0]).st_size == 8 * M


def test_a_user_is_one_guest_whatever_number_of_files_it_has(desk: Desk) -> None:
    assert reserved(desk, owner="1234567")[1] == USER


def test_who_names_nobody_has_a_file_of_root(desk: Desk) -> None:
    made, user, granted = reserved(desk, mode="0400")
    assert (made.file, user.name) == (RegionFile("db/new", 0, pwd.getpwuid(0).pw_gid, 0o400), f"user-{ROOT}")
    assert granted.access is Access.RO


def test_a_quota_counts_what_a_user_has_and_stays(tmp_path: Path) -> None:
    known = replace(USER, service=Service(user=1234567, group=1234567, quota=12 * M))
    with desks(tmp_path, regions=(OWNED,), guests=(known,), grants=(grant(guest=known.name),)) as desk:
        desk.mount = Mount()
        assert OWNED.size == 4 * M
        assert reserved(desk, owner="1234567")[1].service == known.service
        (refusal,) = regions.reserve(desk, Reserve("more", 9 * M, path="more", owner="1234567")).refusals
        assert (refusal.code, refusal.why) == ("OverQuota", "its files may be 12M altogether")
        work = regions.reserve(desk, Reserve("more", 9 * M, path="more", owner="1234567", quota=16 * M))
        assert not work.refusals
        assert work.aims.guests[0].service == Service(user=1234567, group=1234567, quota=16 * M)


def test_a_guest_of_another_kind_keeps_its_name(tmp_path: Path) -> None:
    with desks(tmp_path, guests=(replace(guest(), name="user-1234567"),)) as desk:
        desk.mount = Mount()
        (refusal,) = regions.reserve(desk, Reserve("new", 8 * M, path="new", owner="1234567")).refusals
        assert refusal.code == "NameTaken"


def test_a_file_that_was_taken_back_is_given_again_to_an_owner_who_is_forgotten(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(OWNED,)) as desk:
        work = grants.map(desk, Map("web", "user-1234567"))
        assert not work.refusals
        desk.carry(steps.run("map", work.steps))
        assert [each.name for each in work.change.guests] == ["user-1234567"]
        assert work.change.guests[0].is_user
        assert [each.guest for each in work.change.grants] == ["user-1234567"]
        assert [each.code for each in grants.map(desk, Map("web", "user-1")).refusals] == ["NoSuchGuest"]


def test_it_lies_where_its_region_says_and_only_for_its_owner(tmp_path: Path) -> None:
    theirs, other = grant(guest=USER.name), replace(grant(), id="g2")
    with desks(tmp_path, regions=(OWNED,), guests=(guest(), USER), grants=(theirs, other)) as desk:
        assert mapped.path_of(theirs, desk.state) == "files/db/items"
        assert mapped.path_of(other, desk.state) == f"guests/{other.guest}/ram/web"
        assert mount_parts.above(desk.state) == ["files", "files/db"]
