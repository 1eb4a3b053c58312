"""Canaries that a kexec takes along: the keeper jumps, memconsole-resume adopts them, they count on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import lab

from memconsole.native import program

GUESTS = ("one", "two", "three")


def run(directory: Path, how: str = "") -> lab.Verdicts:
    """The scenario, with something gone wrong on purpose or not."""
    # as a host's init would; whatever it leaves behind lets go of the pipe
    first = f"{{ {program('memconsole-resume')}; echo $? >/run/resume.code; }} 2>&1 | cat >/run/resume.err"
    if how == "homeless":  # where the keeper's socket belongs, there is something that cannot go
        first = f"grep -q stage=2 /proc/cmdline && mkdir -p /run/memconsole/keeper/x; {first}"
    said = lab.run("resume", directory, arguments=[how] if how else [], early=first)
    said.check()
    return said


@pytest.mark.group("resume-go")
def test_canaries_go_on_over_two_kexecs_with_every_page_where_it_was(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert said.stages == 3
    for stage in (2, 3):
        verdicts = {verdict["name"]: verdict for verdict in said.said if verdict["stage"] == stage}
        for name in GUESTS:
            assert verdicts[f"guest-{name}"]["restored"] == stage - 1
            assert verdicts[f"frames-{name}"]["ok"]


@pytest.mark.group("resume-broken")
def test_a_broken_plan_loses_nothing_and_guests_can_be_resumed_by_hand(tmp_path: Path) -> None:
    said = run(tmp_path, "broken")
    resume = said.of("resume")
    found = [(finding["id"], finding["subject"]) for finding in resume["findings"]]
    assert found == [("plan-broken", "manifest"), *(("session-kept", f"memconsole:{name}") for name in GUESTS)]
    assert resume["guests"] == []
    assert "plan-broken: manifest: the boot plan is broken (its checksum does not match)" in resume["err"]
    assert {name for name in GUESTS if said.of(f"later-{name}")["ok"]} == set(GUESTS)


@pytest.mark.group("resume-guest")
def test_a_guest_whose_pages_are_not_where_they_were_is_not_resumed_by_itself(tmp_path: Path) -> None:
    said = run(tmp_path, "moved")
    found = {guest["guest"]: guest for guest in said.of("resume")["guests"]}
    assert found["two"]["state"] == "held"
    assert found["two"]["why"] == "the pages of region:two:0 are not where they were"
    assert said.of("later-two")["ok"]


@pytest.mark.group("resume-spoiled")
def test_a_spoiled_state_and_a_missing_session_are_findings_and_the_others_go_on(tmp_path: Path) -> None:
    said = run(tmp_path, "unfit")
    findings = {(finding["id"], finding["subject"]) for finding in said.of("resume")["findings"]}
    missing = {("session-missing", "memconsole:nobody"), ("lost", "region:nobody:0")}
    assert findings == missing | {("guest-held", "one")}


@pytest.mark.group("resume-a")
def test_without_a_keeper_a_process_holds_everything_and_the_guests_run(tmp_path: Path) -> None:
    said = run(tmp_path, "homeless")
    assert "no-keeper" in said.of("resume")["err"]
    assert said.of("holder")["ok"]
