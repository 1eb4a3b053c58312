"""No finding comes or goes because an action happens to run: what stood stands, what is new waits until it ended."""

from __future__ import annotations

from memconsole import actions as do
from memconsole.backend.ledger.state import State, StateChange, WindowGrant
from memconsole.backend.observe.steady import ActionScope, SteadyFindings, action_scope
from memconsole.model import Access, Finding, Grant, GrantState, Guest, GuestKind, GuestState, Severity


def found(id: str, subject: str, what: str = "") -> Finding:
    return Finding(id, Severity.ERROR, subject, what)


def grant(id: str, region: str, guest: str) -> Grant:
    return Grant(id, region, guest, 0, 4096, Access.RW, GrantState.MAPPED)


LOST, STRAY, OTHER = found("region-lost", "web"), found("mapping-unknown", "web"), found("guest-gone", "db")
WEB = ActionScope(frozenset({"web"}))


def test_what_seems_new_of_what_an_action_changes_is_not_said_while_it_runs() -> None:
    steady = SteadyFindings()
    began = steady.change_count()
    with steady.acting(WEB):
        assert steady.stable_findings([LOST, OTHER], began) == (OTHER,)
    assert steady.stable_findings([LOST], began) == ()  # a Snapshot that began before: it may have read either side
    assert steady.stable_findings([LOST], steady.change_count()) == (LOST,)


def test_what_stood_stands_while_an_action_runs() -> None:
    steady = SteadyFindings()
    assert steady.stable_findings([STRAY, OTHER], steady.change_count()) == (STRAY, OTHER)
    with steady.acting(WEB):
        assert steady.stable_findings([], steady.change_count()) == (STRAY,)
        assert steady.stable_findings([LOST], steady.change_count()) == (STRAY,)
    assert steady.stable_findings([], steady.change_count()) == ()


def test_wrong_bytes_are_said_at_once() -> None:
    steady, wrong = SteadyFindings(), found("guest-corrupt", "web")
    with steady.acting(ActionScope(all=True)):
        assert steady.stable_findings([wrong, LOST], steady.change_count()) == (wrong,)


def test_two_actions_in_one_another_both_count() -> None:
    steady = SteadyFindings()
    with steady.acting(WEB):
        with steady.acting(ActionScope(frozenset({"db"}))):
            assert steady.stable_findings([LOST, OTHER], steady.change_count()) == ()
        assert steady.stable_findings([LOST, OTHER], steady.change_count()) == (OTHER,)


def test_a_process_that_becomes_a_guest_is_nobody_elses_vm_meanwhile() -> None:
    steady, vm = SteadyFindings(), found("ram-not-preserved", "qemu-812")
    what = action_scope(State(), do.GuestStart("vm"), "vm", StateChange())
    with steady.acting(what):
        assert steady.stable_findings([vm], steady.change_count()) == ()
    assert steady.stable_findings([vm], steady.change_count()) == (vm,)


def test_an_action_touches_what_is_joined_to_it_by_grants() -> None:
    grants = (grant("g1", "web", "db"), grant("g2", "web", "vm"), grant("g3", "log", "x"))
    state = State(
        grants={each.id: each for each in grants},
        windows={"g4": WindowGrant("g4", "0000:00:02.0:0", "vm", 0)},
    )
    assert action_scope(state, do.Revoke("g1"), "g1", StateChange()).names >= {"g1", "web", "db", "g2", "vm"}
    assert not action_scope(state, do.Revoke("g1"), "g1", StateChange()).names & {"g3", "log", "x"}
    assert action_scope(state, do.GuestStop("vm"), "vm", StateChange()).names >= {
        "vm",
        "g2",
        "web",
        "g4",
        "0000:00:02.0:0",
    }
    aims = StateChange(
        guests=(Guest("new", GuestKind.CANARY, GuestState.STARTING, None),), grants=(grant("g5", "fresh", "new"),)
    )
    assert action_scope(state, do.GuestStart("new"), "new", aims).names == {"new", "g5", "fresh"}
    assert action_scope(state, do.HandoffRehearse(), "handoff", StateChange()).concerns(OTHER)
