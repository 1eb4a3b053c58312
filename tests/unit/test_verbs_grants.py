"""``map`` and ``revoke``: what they refuse, what a guest is offered, and what becomes of it when a step fails."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, Facts, Live, M, desk_of, desks, grant, guest, region

from memconsole import actions as do
from memconsole.backend import steps
from memconsole.backend.verbs import grants
from memconsole.errors import Gone, GuestError
from memconsole.model import Access, Grant, GrantState, GuestKind, GuestState, RevokeOutcome, Rung

GIANT = 1 << 40
FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE (uapi/linux/fcntl.h)."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Regions ``web`` (granted to db as g1 at gpa 0) and ``ram``; ``big`` has two segments; ``vm`` is a QEMU."""
    with desks(
        tmp_path,
        regions=(region(), region("ram"), region("big", GIANT)),
        guests=(guest(), guest("vm", GuestKind.QEMU, pid=4001), guest("gone", pid=4002), guest("dead", pid=4003)),
        grants=(grant(length=M, gpa=0),),
        live=(
            Live("db"),
            Live("vm", GuestKind.QEMU, 4001),
            Live("dead", pid=4003, says=GuestState.GONE),
        ),
    ) as made:
        yield made


def codes(desk: Desk, action: do.Map) -> list[str]:
    work = grants.map(desk, action)
    assert bool(work.refusals) != bool(work.steps)
    assert all(each.remedy for each in work.refusals)
    return [each.code for each in work.refusals]


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (do.Map("none", "db"), "NoSuchRegion"),
        (do.Map("ram", "none"), "NoSuchGuest"),
        (do.Map("ram", "db", offset=-4096), "BadRange"),
        (do.Map("ram", "db", offset=4 * M), "BadRange"),
        (do.Map("ram", "db", length=0), "BadRange"),
        (do.Map("ram", "db", length=5 * M), "BadRange"),
        (do.Map("ram", "db", offset=100, length=4096), "BadRange"),
        (do.Map("big", "db"), "BadRange"),
        (do.Map("ram", "db", gpa=8 * M + 5), "BadRange"),
        (do.Map("ram", "db", length=4096, gpa=-4096), "BadRange"),
        (do.Map("ram", "db", gpa=1 << 52), "BadRange"),
        (do.Map("web", "db"), "Shared"),
        (do.Map("web", "db", offset=2 * M, access=Access.RO), "Shared"),
        (do.Map("ram", "db", gpa=M - 4096), "Overlap"),
        (do.Map("ram", "vm"), "FixedRam"),
        (do.Map("ram", "gone"), "GuestGone"),
        (do.Map("ram", "dead"), "GuestGone"),
        (do.Map("ram", "db", dma="0000:00:04.0"), "NoSuchDevice"),
    ],
)
def test_a_grant_that_cannot_be_given_is_refused_by_name(desk: Desk, action: do.Map, code: str) -> None:
    assert codes(desk, action) == [code]


def test_a_region_whose_memory_is_lost_is_not_granted(tmp_path: Path) -> None:
    with desks(tmp_path, regions=(region(),), guests=(guest(),), live=(Live("db"),), lost=frozenset({"web"})) as desk:
        assert codes(desk, do.Map("web", "db")) == ["RegionLost"]


def test_a_region_sealed_against_writing_is_granted_to_read_only(desk: Desk) -> None:
    fcntl.fcntl(desk.fds("ram")[0], fcntl.F_ADD_SEALS, FUTURE_WRITE)
    (refusal,) = grants.map(desk, do.Map("ram", "db")).refusals
    assert (refusal.code, refusal.remedy) == ("AccessTooWide", "map it with --access ro")
    assert "future_write" in refusal.why
    assert codes(desk, do.Map("ram", "db", access=Access.RO)) == []


def test_a_guest_that_does_not_answer_is_offered_all_the_same(desk: Desk) -> None:
    live = desk.live_guest("db")
    assert live is not None
    live.trouble = GuestError("db does not answer")
    assert codes(desk, do.Map("ram", "db")) == []


@pytest.mark.parametrize(("maps", "state"), [(True, GrantState.MAPPED), (False, GrantState.OFFERED)])
def test_a_guest_maps_it_now_or_when_its_agent_comes(desk: Desk, maps: bool, state: GrantState) -> None:
    live = desk.live_guest("db")
    assert live is not None
    live.maps = maps
    work = grants.map(desk, do.Map("ram", "db", offset=M, length=2 * M, gpa=8 * M))
    assert work.subject == "g2"
    assert [made.state for made in work.aims.grants] == [GrantState.OFFERED]
    (step,) = work.steps
    assert "from 0x00100000, rw, to db at gpa 0x00800000 as g2; its file descriptor reaches all 4M" in step.text
    desk.carry(steps.run("map", work.steps))
    (made,) = work.change.grants
    assert (made.id, made.state, made.offset, made.length) == ("g2", state, M, 2 * M)
    assert live.did == ["offer g2"]
    assert work.text == f"db {'maps' if maps else 'may map'} 2M of ram (rw) as g2"
    assert step.undo is not None
    step.undo()
    assert live.did == ["offer g2", "unmap g2"]


def test_a_guest_that_ends_between_plan_and_step_is_named(desk: Desk) -> None:
    work = grants.map(desk, do.Map("ram", "db"))
    desk.remove_guest("db")
    with pytest.raises(Gone, match="guest db is gone"):
        desk.carry(steps.run("map", work.steps))
    assert work.change.grants == ()
    assert work.steps[0].undo is not None
    work.steps[0].undo()  # nobody is left to be asked for it back


def test_a_lazy_grant_that_the_guest_cannot_have_lazily_is_asked_back(desk: Desk) -> None:
    live = desk.live_guest("db")
    assert live is not None
    work = grants.map(desk, do.Map("ram", "db", lazy=True))
    assert "pages filled when first touched" in work.steps[0].text
    with pytest.raises(GuestError) as refused:
        desk.carry(steps.run("map", work.steps))
    assert refused.value.code == "NotLazy"
    assert live.did == ["offer g2", "unmap g2"]


def test_a_lazy_grant_whose_faults_are_served_is_mapped(desk: Desk) -> None:
    desk.userfaults.served.add("g2")
    work = grants.map(desk, do.Map("ram", "db", lazy=True))
    desk.carry(steps.run("map", work.steps))
    assert work.change.grants[0].lazy


# --- revoke -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (do.Revoke("g9"), "NoSuchGrant"),
        (do.Revoke("g1", within=0), "BadDeadline"),
        (do.Revoke("g1", within=float("nan")), "BadDeadline"),
    ],
)
def test_a_revoke_that_cannot_be_is_refused_by_name(desk: Desk, action: do.Revoke, code: str) -> None:
    work = grants.revoke(desk, action)
    assert [each.code for each in work.refusals] == [code]
    assert not work.steps


def test_the_plan_of_a_revoke_names_the_rungs_it_may_climb(desk: Desk) -> None:
    (step,) = grants.revoke(desk, do.Revoke("g1", at_most=Rung.PROTECT)).steps
    assert "protect its mapping" in step.text
    assert "kill" not in step.text
    assert step.undo is None


def test_a_revoked_grant_is_no_grant_any_more(tmp_path: Path) -> None:
    canary = guest("db", GuestKind.CANARY)
    with desks(tmp_path, regions=(region(),), guests=(canary,), grants=(grant(),), live=(Live("db"),)) as desk:
        work = grants.revoke(desk, do.Revoke("g1", within=0.01))
        desk.carry(steps.run("revoke", work.steps))
        assert work.revoke is not None
        assert (work.revoke.rung, work.revoke.outcome) == (Rung.ASK, RevokeOutcome.CUT)
        assert work.change.without_grants == ("g1",)
        assert desk.withdrawn == ["g1"]
        assert work.text.startswith("g1 (web to db) is cut after ask, in ")


def test_a_device_loses_a_grant_before_its_guest_is_asked_and_that_lasts(tmp_path: Path) -> None:
    given: Grant = grant(dma="0000:00:04.0", gpa=0)
    live = Live("db", unmaps=False)
    facts = Facts((region(),), (guest(),), (given,), live=(live,), reaching=((4000,),))
    with desk_of(tmp_path, facts) as desk:
        desk.address_spaces.mapped.add("g1")
        work = grants.revoke(desk, do.Revoke("g1", within=0.01, at_most=Rung.ASK))
        assert [step.id for step in work.steps] == ["dma", "cut"]
        with pytest.raises(GuestError) as kept:
            desk.carry(steps.run("revoke", work.steps))
        assert kept.value.code == "StillMapped"
        assert desk.address_spaces.mapped == set()
        assert [each.dma for each in work.lasting.grants] == [None]
