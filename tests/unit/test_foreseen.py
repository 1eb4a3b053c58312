"""Plans of Actions that follow others: each sees what those before it would have made, taken back or stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.desks import Desk, Live, M, desks, grant, guest, region

from memconsole import actions as do
from memconsole.actions import Action
from memconsole.backend import foreseen, verbs
from memconsole.model import GuestKind, GuestState

GIB = 1 << 30


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """Region ``web``, which process db maps as g1; ``ram`` is free; ``vm`` is a QEMU on ``vm``, as g2."""
    with desks(
        tmp_path,
        regions=(region(), region("ram"), region("vm")),
        guests=(guest(), guest("vm", GuestKind.QEMU, pid=4001)),
        grants=(grant(gpa=0), grant("g2", "vm", "vm", gpa=0)),
        live=(Live("db"), Live("vm", GuestKind.QEMU, 4001)),
        mapping=(4000,),
    ) as made:
        yield made


def codes(desk: Desk, *words: Action) -> list[str]:
    """By what names the last of some Actions would be refused after the others; what is there stays as it is."""
    *before, last = words
    state = desk.state
    work = verbs.prepare(foreseen.desk_after(desk, before), last)
    assert desk.state is state
    assert bool(work.refusals) != bool(work.steps)
    return [each.code for each in work.refusals]


RESERVE = do.Reserve("new", 8 * M)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((RESERVE, do.Map("new", "db", gpa=64 * M)), []),
        ((RESERVE, do.Reserve("new", M)), ["NameInCustody", "NameTaken"]),
        ((RESERVE, do.Map("new", "db", gpa=0)), ["Overlap"]),
        ((RESERVE, do.Map("new", "db", length=16 * M)), ["BadRange"]),
        ((RESERVE, do.Map("new", "db", gpa=64 * M), do.Map("new", "db", gpa=128 * M)), ["Shared"]),
        ((RESERVE, do.Map("new", "db", gpa=64 * M), do.Release("new")), ["Granted"]),
        ((RESERVE, do.Map("new", "db", gpa=64 * M), do.Revoke("g3"), do.Release("new")), []),
        ((RESERVE, do.Release("new"), do.Map("new", "db")), ["NoSuchRegion"]),
        ((do.Release("web"),), ["Granted"]),
        ((do.Revoke("g1"), do.Release("web")), []),
        ((do.Revoke("g1"), do.Release("web"), do.Reserve("web", M)), []),
        ((do.GuestStop("db"), do.Map("ram", "db")), ["NoSuchGuest"]),
        ((do.GuestStop("db"), do.Release("web")), []),
        ((do.GuestStart("bird", memory=M), do.Map("ram", "bird", gpa=64 * M)), []),
        ((do.GuestStart("bird", memory=M), do.Release("bird")), ["Granted"]),
        ((do.GuestStart("bird", memory=M), do.GuestPause("bird")), []),
        ((do.GuestStart("bird", memory=M), do.GuestResume("bird")), ["NotPaused"]),
        ((do.GuestPause("db"), do.GuestPause("db")), ["NotRunning"]),
        ((do.GuestPause("db"), do.GuestResume("db")), []),
        ((do.GuestPause("db"), do.GuestResume("db"), do.GuestResume("db")), ["NotPaused"]),
        ((do.GuestStart("bird", memory=M), do.GuestStop("bird"), do.Release("bird")), []),
        ((do.Release("web"), do.Map("web", "db")), ["Shared"]),
    ],
    ids=lambda each: "-".join(word.spec.id for word in each) if isinstance(each, tuple) else ",".join(each) or "done",
)
def test_a_plan_sees_what_the_actions_before_it_would_change(
    desk: Desk, words: tuple[Action, ...], expected: list[str]
) -> None:
    assert sorted(codes(desk, *words)) == expected


def test_what_is_not_there_yet_has_the_id_that_it_will_have(desk: Desk) -> None:
    first = verbs.prepare(foreseen.desk_after(desk, [RESERVE]), do.Map("new", "db", gpa=64 * M))
    second = verbs.prepare(
        foreseen.desk_after(desk, [RESERVE, do.Map("new", "db", gpa=64 * M)]), do.Map("ram", "db", gpa=GIB)
    )
    assert (first.subject, second.subject) == ("g3", "g4")


def test_memory_that_would_be_reserved_is_not_there_any_more(desk: Desk) -> None:
    desk.tree.meminfo()
    most = next(size for size in (1 << n for n in range(50, 20, -1)) if codes(desk, do.Reserve("a", size)) == [])
    assert codes(desk, do.Reserve("a", most), do.Reserve("b", most)) == ["NoMemory"]


@pytest.mark.parametrize("resumes", [True, False])
def test_a_qemu_whose_ram_is_taken_back_waits_where_custody_can_keep_it(
    desk: Desk, resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(desk.custody), "resumes", resumes)
    back = (do.Revoke("g2"), do.Map("vm", "vm"))
    assert codes(desk, do.Revoke("g2"), do.GuestPause("vm")) == ["GuestGone"]
    other = ["OtherRam"] if resumes else ["GuestGone", "FixedRam"]
    assert codes(desk, do.Revoke("g2"), do.Map("ram", "vm")) == other
    if resumes:
        assert codes(desk, *back) == []
        assert codes(desk, do.Revoke("g2"), do.GuestResume("vm")) == ["NoRam"]
        assert codes(desk, *back, do.GuestResume("vm")) == []
        assert codes(desk, *back, do.GuestResume("vm"), do.GuestPause("vm")) == []


def test_a_handoff_after_others_is_judged_by_what_is_there(desk: Desk) -> None:
    before = [do.GuestStart("bird", memory=M), RESERVE, do.GuestStop("db")]
    there, note = foreseen.for_handoff(foreseen.desk_after(desk, before))
    assert sorted(there.state.guests) == ["vm"]
    assert sorted(there.state.regions) == ["ram", "vm", "web"]
    assert note == "what is not there yet (bird, new) is judged when it runs"
    assert foreseen.for_handoff(desk) == (desk, "")


def test_a_guest_that_is_foreseen_says_what_it_would(desk: Desk) -> None:
    found = foreseen.desk_after(desk, [do.GuestStart("bird", memory=M), do.GuestPause("bird")])
    live = found.live_guest("bird")
    assert live is not None
    assert found.state_of(live) is GuestState.PAUSED
    assert found.connected("bird")
    assert found.live_guest("db") is desk.live_guest("db")
