"""What the ledger's records amount to, and what a list of steps does when one of them fails."""

from __future__ import annotations

import os
import signal
from functools import partial

import msgspec
import pytest
from support.synthetic import snapshot

from memconsole.actions import Map, Release, Reserve
from memconsole.backend import ledger, steps
from memconsole.backend.ledger import Kind
from memconsole.backend.state import KINDS, Change, Done, Failed, Happened, Intent, Record, State, decode, fold
from memconsole.backend.steps import FAULT_VARIABLE, Step, fault_points, run
from memconsole.errors import BadFile, GuestError
from memconsole.model import Access, Danger, Effect, Grant, GrantState, Plan, Region, RegionState

REGION = Region("web", "memfd", 4096, 4096, RegionState.RESERVED)
GRANT = Grant("g7", "web", "db", 0, 4096, Access.RW, GrantState.OFFERED)


def records(*payloads: Record) -> list[ledger.Record]:
    return [
        ledger.Record(seq, KINDS[type(payload)], msgspec.json.encode(payload))
        for seq, payload in enumerate(payloads, 1)
    ]


NOTHING = Change()


def intent(*, aims: Change = NOTHING) -> Intent:
    return Intent(5, Reserve("web", 4096), "web", "uid 0", aims)


def test_an_action_counts_once_it_is_done() -> None:
    begun = records(intent(), Done(1, 9, "it is there", Change(regions=(REGION,))))
    assert fold(begun[:1]).regions == {}
    assert fold(begun[:1]).unfinished == {1: intent()}
    state = fold(begun)
    assert state.regions == {"web": REGION}
    assert state.unfinished == {}
    (event,) = state.events
    assert (event.seq, event.at_ns, event.kind, event.subject, event.peer) == (2, 9, "reserve", "web", "uid 0")


def test_a_failed_action_leaves_what_it_says() -> None:
    state = fold(
        records(
            Happened(1, "adopted", "web", "", change=Change(regions=(REGION,), grants=(GRANT,))),
            intent(),
            Failed(2, 9, "StillMapped", "no", Change(without_grants=("g7",))),
        )
    )
    assert (state.regions, state.grants) == ({"web": REGION}, {})
    assert state.events[-1].text == "failed: no"


def test_a_grant_id_is_never_given_twice() -> None:
    state = fold(records(intent(aims=Change(grants=(GRANT,))), Failed(1, 9, "Guest", "no")))
    assert state.grants == {}
    assert state.next_grant == 8
    assert fold(records(state.whole())).next_grant == 8


def test_the_whole_means_the_same_as_what_led_to_it() -> None:
    made = snapshot(20, 4)
    regions = tuple(msgspec.structs.replace(region, seen=None) for region in made.regions)
    state = fold(
        records(Happened(1, "x", "", "", change=Change(regions=regions, grants=made.grants, guests=made.guests)))
    )
    again = fold(records(state.whole()))
    assert (again.regions, again.grants, again.guests) == (state.regions, state.grants, state.guests)
    assert again.whole() == state.whole()


def test_a_state_that_was_handed_out_does_not_change() -> None:
    first = State()
    second = first.after(1, Happened(1, "x", "", "", change=Change(regions=(REGION,))))
    assert (first.regions, first.events) == ({}, [])
    assert (second.regions, len(second.events)) == ({"web": REGION}, 1)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (99, b"{}"),
        (Kind.DONE, b"{}"),
        (Kind.DONE, b"not json"),
        (Kind.INTENT, b'{"at_ns":1,"action":{"do":"explode"}}'),
    ],
)
def test_a_record_nobody_knows_is_named(kind: int, payload: bytes) -> None:
    with pytest.raises(BadFile, match="record 7"):
        decode(ledger.Record(7, kind, payload))


# --- steps --------------------------------------------------------------------------------------------------------


def diary(fails: str = "", undo_fails: str = "") -> tuple[list[Step], list[str]]:
    said: list[str] = []

    def say(word: str) -> None:
        if word in {fails, undo_fails}:
            raise GuestError(f"{word} failed")
        said.append(word)

    made = [Step(id, id, partial(say, id), partial(say, f"un{id}"), f"un{id}") for id in ("a", "b", "c")]
    return made, said


def test_steps_run_in_order() -> None:
    made, said = diary()
    run("x", made)
    assert said == ["a", "b", "c"]


def test_what_was_done_is_undone_in_reverse() -> None:
    made, said = diary(fails="c")
    with pytest.raises(GuestError, match="c failed"):
        run("x", made)
    assert said == ["a", "b", "unb", "una"]


def test_what_cannot_be_undone_is_said_and_the_rest_is_undone() -> None:
    made, said = diary(fails="c", undo_fails="unb")
    with pytest.raises(GuestError, match="not undone: b") as failed:
        run("x", made)
    assert failed.value.what == "c failed"
    assert said == ["a", "b", "una"]


def test_every_step_boundary_is_a_fault_point() -> None:
    plan = Plan("map", "", Danger.CHANGES, (Effect("one", ""), Effect("two", "")))
    assert fault_points(plan) == ("map.one.before", "map.one.after", "map.two.before", "map.two.after")


@pytest.mark.parametrize("point", ["x.b.before", "x.b.after"])
def test_a_process_dies_at_its_fault_point(point: str) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.environ[FAULT_VARIABLE] = point
        made = [Step(id, id, partial(os.write, writing, id.encode())) for id in "abc"]
        run("x", made)
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    said = os.read(reading, 10)
    os.close(reading)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert said == (b"a" if point.endswith("before") else b"ab")


def test_no_point_is_passed_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "y.a.before")
    made, said = diary()
    steps.run("x", made)
    assert said == ["a", "b", "c"]


def test_actions_of_every_kind_survive_the_ledger() -> None:
    for action in (Map("web", "db", gpa=4096), Release("web")):
        record = Intent(1, action, "web")
        assert decode(records(record)[0]) == record
