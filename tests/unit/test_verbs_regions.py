"""``reserve`` and ``release``: what they refuse, and what their steps make of custody and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, M, desks, grant, guest, region

from memconsole.actions import Release, Reserve
from memconsole.backend import steps
from memconsole.backend.verbs import regions
from memconsole.errors import Refused
from memconsole.model import RegionState


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with desks(tmp_path, regions=(region(),), guests=(guest(),)) as made:
        yield made


@pytest.mark.parametrize(
    ("action", "codes"),
    [
        (Reserve("web", 4 * M), ["NameTaken", "NameInCustody"]),
        (Reserve("-web", 4 * M), ["BadName"]),
        (Reserve("new", 4 * M, store="tape"), ["NoSuchStore"]),
        (Reserve("new", 4 * M + 1), ["BadSize"]),
        (Reserve("new", 0), ["BadSize"]),
        (Reserve("new", 4 * M, page_size=8192), ["BadPageSize"]),
        (Reserve("new", 4 * M, node=7), ["NoNode"]),
        (Reserve("new", 1 << 44), ["NoMemory"]),
        (Reserve("new", 4 * M, page_size=2 * M), ["NoHugePages"]),
    ],
)
def test_a_region_that_cannot_be_made_is_refused_by_name(desk: Desk, action: Reserve, codes: list[str]) -> None:
    work = regions.reserve(desk, action)
    assert [each.code for each in work.refusals] == codes
    assert not work.steps
    assert all(each.remedy for each in work.refusals)


def test_memory_that_other_regions_may_still_take_is_not_given_twice(desk: Desk) -> None:
    desk.tree.meminfo(free=6 * M)
    (refusal,) = regions.reserve(desk, Reserve("new", 1 << 40)).refusals
    assert refusal.code == "NoMemory"
    assert "4M more are reserved" in refusal.why


def test_a_region_is_held_and_in_custody_once_its_steps_ran(desk: Desk) -> None:
    work = regions.reserve(desk, Reserve("new", 8 * M))
    assert [step.id for step in work.steps] == ["create", "hold"]
    assert work.aims.regions[0].segments == ()
    desk.carry(steps.run("reserve", work.steps))
    (made,) = work.change.regions
    assert os.fstat(desk.fds("new")[0]).st_size == 8 * M
    assert made.segments[0].inode == os.fstat(desk.fds("new")[0]).st_ino
    assert made.state is RegionState.RESERVED
    assert "region:new:0" in desk.custody.names()


def test_a_region_that_cannot_be_held_is_given_back(desk: Desk) -> None:
    work = regions.reserve(desk, Reserve("new", 8 * M))

    def full() -> None:
        raise Refused("custody is full", "", "", code="CustodyFull")

    work.step("more", "something that fails", full)
    with pytest.raises(Refused, match="custody is full"):
        desk.carry(steps.run("reserve", work.steps))
    assert not desk.holds_region("new")
    assert desk.custody.names() == ["region:web:0"]


def test_a_region_that_is_not_there_cannot_be_released(desk: Desk) -> None:
    (refusal,) = regions.release(desk, Release("db")).refusals
    assert (refusal.code, refusal.why) == ("NoSuchRegion", "regions: web")


def test_a_region_that_is_granted_is_not_released(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), guests=(guest(),), grants=(grant(),)) as desk:
        (refusal,) = regions.release(desk, Release("web")).refusals
    assert (refusal.code, refusal.why, refusal.remedy) == ("Granted", "its grants: g1 to db", "memconsole revoke g1")


def test_a_region_that_a_process_maps_without_a_grant_is_not_released(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), mapping=(4321,)) as desk:
        (refusal,) = regions.release(desk, Release("web")).refusals
    assert refusal.code == "StillMapped"
    assert "4321" in refusal.why


def test_a_released_region_is_wiped_freed_and_out_of_custody(desk: Desk) -> None:
    (fd,) = desk.fds("web")
    copy = os.dup(fd)
    os.pwrite(copy, b"secret", 0)
    work = regions.release(desk, Release("web"))
    assert [step.id for step in work.steps] == ["wipe", "free", "forget"]
    assert all(step.undo is None for step in work.steps)
    desk.carry(steps.run("release", work.steps))
    assert os.fstat(copy).st_size == 0, "who still has the file finds nothing in it"
    os.close(copy)
    assert not desk.holds_region("web")
    assert desk.custody.names() == []
    assert work.change.without_regions == ("web",)
    assert work.text.startswith("region web is released: 4K zeroed at ")


def test_a_region_whose_memory_is_lost_is_forgotten(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), lost=frozenset({"web"})) as desk:
        work = regions.release(desk, Release("web"))
        desk.carry(steps.run("release", work.steps))
    assert work.text == "region web is forgotten; its memory was lost already"


def test_what_is_left_in_custody_of_a_region_is_given_up(desk: Desk) -> None:
    desk.custody.put("region:old:1", desk.fds("web")[0])
    work = regions.release(desk, Release("old"))
    desk.carry(steps.run("release", work.steps))
    assert "region:old:1" in work.text
    assert desk.custody.names() == ["region:web:0"]


def test_a_torn_region_is_given_up_with_what_is_left_of_it(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), lost=frozenset({"web"})) as desk:
        with Path("/dev/null").open("rb") as file:
            desk.custody.put("region:web:1", file.fileno())
        work = regions.release(desk, Release("web"))
        assert work.text == "region web is released, with what was left of it: region:web:1"
        desk.carry(steps.run("release", work.steps))
        assert desk.custody.names() == []
