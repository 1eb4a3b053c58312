"""Whether a host is ready to hand off: the verdict in words, and when a control process looks again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole import readiness
from memconsole.actions import HandoffRun
from memconsole.backend.readiness import REST_S, ReadinessCheck
from memconsole.backend.wire import metrics
from memconsole.errors import KernelRefused
from memconsole.model import (
    Condition,
    Danger,
    GuestResult,
    HandoffReport,
    HandoffState,
    Plan,
    Readiness,
    Refusal,
    Severity,
    Snapshot,
)
from memconsole.readiness import Verdict

S = 1_000_000_000
SNAPSHOT = synthetic.snapshot()


def condition(id: str, *, ok: bool = False, severity: Severity = Severity.ERROR) -> Condition:
    return Condition(id, severity, ok, f"{id} is required", f"{id} is lost", f"{id} is missing", f"bring {id}")


def planned(*conditions: Condition, refusals: tuple[Refusal, ...] = ()) -> Plan:
    return Plan("handoff-run", "memconsole handoff run", Danger.DESTROYS, (), refusals, None, conditions)


WARNING = condition("base-pages", severity=Severity.WARNING)
CASES = {
    "ready": ((condition("custody", ok=True),), Verdict.READY, "ready to hand off: none of 1 conditions refuses it"),
    "warned": ((WARNING,), Verdict.READY, "ready to hand off: none of 1 conditions refuses it, 1 warning"),
    "refused": (
        (WARNING, condition("hugetlb")),
        Verdict.REFUSED,
        "not ready to hand off: hugetlb: hugetlb is missing (1 warning)",
    ),
    "twice": (
        (condition("hugetlb"), condition("custody")),
        Verdict.REFUSED,
        "not ready to hand off: hugetlb: hugetlb is missing (1 more)",
    ),
    "nothing": ((), Verdict.UNKNOWN, "not known to be ready: no condition was judged"),
}


@pytest.mark.parametrize(("conditions", "expected", "words"), CASES.values(), ids=CASES)
def test_a_verdict_names_its_first_reason(conditions: Any, expected: Verdict, words: str) -> None:
    found = readiness.judge(lambda _: planned(*conditions))
    assert readiness.verdict(found) is expected
    assert readiness.sentence(found) == words


def test_what_was_never_judged_or_could_not_be_is_unknown() -> None:
    def fails(_: HandoffRun) -> Plan:
        raise KernelRefused("the kernel said no", 5)

    found = readiness.judge(fails)
    refused = readiness.judge(lambda _: planned(refusals=(Refusal("ReadOnly", "nothing is done here"),)))
    assert [readiness.verdict(each) for each in (None, found, refused)] == [Verdict.UNKNOWN] * 3
    assert "the kernel said no" in readiness.sentence(found)
    assert "nothing is done here" in readiness.sentence(refused)


def test_one_line_has_the_host_the_verdict_and_the_last_handoff() -> None:
    made = HandoffReport(
        "rehearse",
        HandoffState.DONE,
        SNAPSHOT.taken_ns - 7200 * S,
        guests=(GuestResult("web", SNAPSHOT.guests[0].kind, 1, back=True, blackout_ns=120_000_000),),
    )
    found = readiness.judge(lambda _: planned(condition("custody", ok=True)))
    taken = replace(SNAPSHOT, readiness=replace(found, checked_ns=SNAPSHOT.taken_ns - 12 * S), handoff=made)
    assert readiness.line(taken) == (
        f"{taken.host.name}: ready to hand off: none of 1 conditions refuses it; checked 12s ago;"
        " last rehearsal done, longest blackout 120.0ms, 2h00m ago"
    )
    assert readiness.line(SNAPSHOT).endswith("; never rehearsed")


class Clock:
    """Seconds that pass when they are told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("memconsole.backend.readiness.time.monotonic", made.monotonic)
    return made


def checked(tmp_path: Path, clock: Clock, taken: Snapshot = SNAPSHOT) -> ReadinessCheck:
    """A check that was made of a Snapshot and may be made again."""
    (tmp_path / "boot").mkdir(exist_ok=True)
    check = ReadinessCheck(lambda _: planned(condition("custody", ok=True)), tmp_path)
    check.check(check.due(taken))
    assert check.found is not None
    clock.now += REST_S + 1
    return check


def test_nothing_is_looked_at_again_while_nothing_changes(tmp_path: Path, clock: Clock) -> None:
    check = checked(tmp_path, clock)
    assert not check.due(SNAPSHOT)
    assert not check.due(replace(SNAPSHOT, taken_ns=SNAPSHOT.taken_ns + S, events=()))
    clock.now += 3600
    assert check.due(SNAPSHOT)


CHANGES = {
    "a region": {"regions": SNAPSHOT.regions[1:]},
    "a guest's state": {"guests": (replace(SNAPSHOT.guests[0], state="stopped"), *SNAPSHOT.guests[1:])},
    "a grant": {"grants": SNAPSHOT.grants[1:]},
    "a device": {"devices": SNAPSHOT.devices[1:]},
    "a finding": {"findings": ()},
    "memory": {"memory": replace(SNAPSHOT.memory, available=SNAPSHOT.memory.available // 4)},
    "live update": {"survival": replace(SNAPSHOT.survival, luo=not SNAPSHOT.survival.luo)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_it_depends_on_is_looked_at(tmp_path: Path, clock: Clock, change: dict[str, Any]) -> None:
    check = checked(tmp_path, clock)
    changed = replace(SNAPSHOT, **change)
    assert changed != SNAPSHOT
    assert check.due(changed)


def test_another_kernel_is_looked_at(tmp_path: Path, clock: Clock) -> None:
    check = checked(tmp_path, clock)
    (tmp_path / "boot" / "vmlinuz-7.4").write_bytes(b"MZ")
    assert check.due(SNAPSHOT)


def test_changes_in_a_row_are_looked_at_with_a_rest(tmp_path: Path, clock: Clock) -> None:
    check = checked(tmp_path, clock)
    changed = replace(SNAPSHOT, findings=())
    check.check(check.due(changed))
    assert not check.due(SNAPSHOT)
    clock.now += REST_S + 1
    assert check.due(SNAPSHOT)


def test_nothing_is_looked_at_while_a_handoff_is_under_way(tmp_path: Path, clock: Clock) -> None:
    check = checked(tmp_path, clock)
    running = replace(SNAPSHOT, findings=(), handoff=HandoffReport("run", HandoffState.RUNNING, 1))
    assert not check.due(running)


def test_the_verdict_is_in_the_metrics_and_absent_where_it_is_not_known() -> None:
    def text(found: Readiness | None) -> str:
        return metrics.text(replace(SNAPSHOT, readiness=found))

    ready = readiness.judge(lambda _: planned(WARNING))
    refused = readiness.judge(lambda _: planned(condition("hugetlb")))
    assert "memconsole_handoff_ready 1\n" in text(ready)
    assert 'memconsole_handoff_conditions_failing{severity="warning",condition="base-pages"} 1\n' in text(ready)
    assert "memconsole_handoff_ready 0\n" in text(refused)
    assert "memconsole_handoff_ready" not in text(None)
