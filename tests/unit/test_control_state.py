"""What the ledger's records amount to, and what a list of steps does when one of them fails."""

from __future__ import annotations

import os
import signal
from functools import partial

import msgspec
import pytest
from support.faultpoints import fault_points
from support.synthetic import snapshot

from memconsole.actions import Map, Release, Reserve
from memconsole.backend.ledger import log as ledger_log
from memconsole.backend.ledger.log import RecordKind
from memconsole.backend.ledger.state import (
    KINDS,
    DoneRecord,
    EventRecord,
    FailedRecord,
    Intent,
    Record,
    Recorded,
    State,
    StateChange,
    decode,
    fold,
)
from memconsole.backend.steps import FAULT_VARIABLE, Step, run
from memconsole.errors import BadFile, GuestError
from memconsole.model import Access, Danger, Effect, Grant, GrantState, Plan, Region, RegionState

REGION = Region("web", "memfd", 4096, 4096, RegionState.RESERVED)
GRANT = Grant("g7", "web", "db", 0, 4096, Access.RW, GrantState.OFFERED)


def records(*payloads: Record) -> list[ledger_log.Record]:
    return [
        ledger_log.Record(seq, KINDS[type(payload)], msgspec.json.encode(payload))
        for seq, payload in enumerate(payloads, 1)
    ]


NOTHING = StateChange()


def intent(*, aims: StateChange = NOTHING) -> Intent:
    return Intent(5, Reserve("web", 4096), "web", "uid 0", aims)


def test_an_action_counts_once_it_is_done() -> None:
    begun = records(intent(), DoneRecord(1, 9, "it is there", StateChange(regions=(REGION,))))
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
            EventRecord(1, "adopted", "web", "", change=StateChange(regions=(REGION,), grants=(GRANT,))),
            intent(),
            FailedRecord(2, 9, "StillMapped", "no", StateChange(without_grants=("g7",))),
        )
    )
    assert (state.regions, state.grants) == ({"web": REGION}, {})
    assert state.events[-1].text == "failed: no"


def test_a_grant_id_is_never_given_twice() -> None:
    state = fold(records(intent(aims=StateChange(grants=(GRANT,))), FailedRecord(1, 9, "Guest", "no")))
    assert state.grants == {}
    assert state.next_grant == 8
    assert fold(records(state.checkpoint())).next_grant == 8


def test_the_whole_means_the_same_as_what_led_to_it() -> None:
    made = snapshot(20, 4)
    regions = tuple(msgspec.structs.replace(region, seen=None) for region in made.regions)
    state = fold(
        records(
            EventRecord(1, "x", "", "", change=StateChange(regions=regions, grants=made.grants, guests=made.guests))
        )
    )
    again = fold(records(state.checkpoint()))
    assert (again.regions, again.grants, again.guests) == (state.regions, state.grants, state.guests)
    assert again.checkpoint() == state.checkpoint()


def test_a_state_that_was_handed_out_does_not_change() -> None:
    first = State()
    second = first.apply_record(1, EventRecord(1, "x", "", "", change=StateChange(regions=(REGION,))))
    assert (first.regions, first.events) == ({}, [])
    assert (second.regions, len(second.events)) == ({"web": REGION}, 1)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (99, b"{}"),
        (RecordKind.DONE, b"{}"),
        (RecordKind.DONE, b"not json"),
        (RecordKind.INTENT, b'{"at_ns":1,"action":{"do":"explode"}}'),
    ],
)
def test_a_record_nobody_knows_is_named(kind: int, payload: bytes) -> None:
    with pytest.raises(BadFile, match="record 7"):
        decode(ledger_log.Record(7, kind, payload))


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
    list(run("x", made))
    assert said == ["a", "b", "c"]


def test_what_was_done_is_undone_in_reverse() -> None:
    made, said = diary(fails="c")
    with pytest.raises(GuestError, match="c failed"):
        list(run("x", made))
    assert said == ["a", "b", "unb", "una"]


def test_what_cannot_be_undone_is_said_and_the_rest_is_undone() -> None:
    made, said = diary(fails="c", undo_fails="unb")
    with pytest.raises(GuestError, match="not undone: b") as failed:
        list(run("x", made))
    assert failed.value.what == "c failed"
    assert said == ["a", "b", "una"]


def test_records_of_a_step_are_handed_up_between_its_lines_and_one_not_written_is_raised_there() -> None:
    said: list[str] = []
    record = EventRecord(1, "moved", "web", "moved")

    def do() -> Recorded[None]:
        said.append("before")
        try:
            said.append(f"recorded as {yield record}")
            yield record
        finally:
            said.append("cleaned up")

    running = run("x", [Step("a", "a", lambda: said.append("a"), lambda: said.append("una")), Step("b", "b", do)])
    assert next(running) is record
    assert said == ["a", "before"]
    assert running.send(7) is record
    with pytest.raises(GuestError):
        running.throw(GuestError("the ledger is full"))
    assert said == ["a", "before", "recorded as 7", "cleaned up", "una"]


def test_every_step_boundary_is_a_fault_point() -> None:
    plan = Plan("map", "", Danger.CHANGES, (Effect("one", ""), Effect("two", "")))
    assert fault_points(plan) == ("map.one.before", "map.one.after", "map.two.before", "map.two.after")


@pytest.mark.parametrize("point", ["x.b.before", "x.b.after"])
def test_a_process_dies_at_its_fault_point(point: str) -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.environ[FAULT_VARIABLE] = point

        def say(id: str) -> None:
            os.write(writing, id.encode())

        made = [Step(id, id, partial(say, id)) for id in "abc"]
        list(run("x", made))
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
    list(run("x", made))
    assert said == ["a", "b", "c"]


def test_actions_of_every_kind_survive_the_ledger() -> None:
    for action in (Map("web", "db", gpa=4096), Release("web")):
        record = Intent(1, action, "web")
        assert decode(records(record)[0]) == record
