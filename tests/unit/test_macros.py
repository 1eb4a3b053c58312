"""Macros: what is written is what is done, and a failure in the middle says what was done and what not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memconsole import actions, macros
from memconsole.actions import Action
from memconsole.errors import BadFile, MacroError, MacroUsage, Refused
from memconsole.macros import Macro
from memconsole.model import Danger, Outcome, Plan

WEB = """
title = "Web tier"
key = "ctrl+w"

[params.name]

[params.size]
default = "64M"
help = "size of the region"

[[step]]
do = "reserve"
name = "${name}"
size = "${size}"
page-size = "2M"

[[step]]
do = "map"
region = "${name}"
guest = "db1"
save = "grant"

[[step]]
view = "regions"
subject = "region:${name}"

[[step]]
do = "revoke"
grant = "${grant}"
within = 0.5
"""


class RecordingSource:
    """A Source that only remembers what it was asked, and refuses what it was told to."""

    label = "recording"
    read_only = ""

    def __init__(self, refuse: str = "") -> None:
        self.applied: list[Action] = []
        self.refuse = refuse

    def plan(self, action: Action) -> Plan:
        return Plan(action.spec.id, actions.cli_form(action), Danger.CHANGES)

    def apply(self, action: Action) -> Outcome:
        if action.spec.id == self.refuse:
            raise Refused("no", "told to", "do not", code="Told")
        self.applied.append(action)
        return Outcome(action.spec.id, f"g{len(self.applied)}", "done")


def run(macro: Macro, source: Any, **given: str) -> list[macros.StepResult]:
    return list(macros.run(macro, source, given))


def test_parameters_and_saved_names_reach_the_actions() -> None:
    source = RecordingSource()
    opened: list[tuple[str, str]] = []
    macro = macros.loads(WEB, "web")
    results = list(macros.run(macro, source, {"name": "w"}, lambda *view: opened.append(view)))  # type: ignore[arg-type]
    assert source.applied == [
        actions.Reserve("w", 64 << 20, page_size=2 << 20),
        actions.Map("w", "db1"),
        actions.Revoke("g2", within=0.5),
    ]
    assert opened == [("regions", "region:w")]
    macros.verdict(macro, results)


def test_a_failure_in_the_middle_stops_and_says_what_was_done() -> None:
    source = RecordingSource(refuse="map")
    macro = macros.loads(WEB, "web")
    results = run(macro, source, name="w")
    assert [bool(result.error) for result in results] == [False, True, False, False]
    assert [result.skipped for result in results] == [False, False, True, True]
    with pytest.raises(MacroError, match=r"step 2 failed.*done: 1; failed: 2; not begun: 3, 4"):
        macros.verdict(macro, results)


def test_continue_goes_on_and_a_name_that_was_never_saved_is_its_own_error() -> None:
    source = RecordingSource(refuse="map")
    results = run(macros.loads('on_failure = "continue"\n' + WEB, "web"), source, name="w")
    assert [result.code for result in results] == ["", "Told", "", "NotSaved"]
    assert not any(result.skipped for result in results)


def test_a_dry_run_changes_nothing_and_shows_every_plan() -> None:
    source = RecordingSource()
    results = list(macros.dry_run(macros.loads(WEB, "web"), source, {"name": "w"}))  # type: ignore[arg-type]
    assert source.applied == []
    assert [result.plan.action for result in results if result.plan] == ["reserve", "map", "revoke"]
    assert "step 1" in results[1].note
    assert "step 2" in results[3].note


def test_parameters_are_checked_before_anything_is_done() -> None:
    source = RecordingSource()
    macro = macros.loads(WEB, "web")
    with pytest.raises(MacroUsage, match="wants name"):
        run(macro, source)
    with pytest.raises(MacroUsage, match="no parameter 'colour'"):
        run(macro, source, name="w", colour="red")
    assert source.applied == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no steps"),
        ("[[step]]\ndo = 'explode'", "unknown action 'explode'"),
        ("[[step]]\ndo = 'release'", "lacks region"),
        ("[[step]]\ndo = 'release'\nregion = 'a'\nforce = true", "no argument 'force'"),
        ("[[step]]\ndo = 'reserve'\nname = 'a'\nsize = '-4M'", "not a size"),
        ("[[step]]\ndo = 'release'\nregion = '${a}'", r"uses \$\{a\}"),
        ("[[step]]\ndo = 'release'\nregion = 'a$'", "stray dollar"),
        ("[[step]]\nview = 'regions'\ndo = 'release'", "either do or view"),
        ("colour = 1\n[[step]]\nview = 'regions'", "colour"),
        ("on_failure = 'panic'\n[[step]]\nview = 'regions'", "panic"),
        ("step = 3", "no steps"),
    ],
)
def test_what_means_nothing_is_a_usage_error(text: str, match: str) -> None:
    with pytest.raises(MacroUsage, match=match):
        macros.loads(text, "m")


def test_files_that_are_no_macros_are_named(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(WEB)
    (tmp_path / "bad.toml").write_text("[[step")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    good, broken = macros.discover([tmp_path])
    assert [macro.name for macro in good] == ["good"]
    assert {path.name for path, _ in broken} == {"bad.toml", "binary.toml"}
    with pytest.raises(BadFile, match="no macro 'nowhere'"):
        macros.find("nowhere", [tmp_path])
    with pytest.raises(BadFile):
        macros.find(str(tmp_path / "bad.toml"))


def test_what_was_recorded_is_written_read_and_done_again(tmp_path: Path) -> None:
    done: list[Action | tuple[str, str]] = [
        actions.Reserve("a$b", 1 << 30, prefault=True),
        ("pfn", "region:a$b"),
        actions.GuestStart("vm", vmm="qemu", args=("-append", 'a "quoted" word')),
        actions.Map("a$b", "vm", offset=4096, gpa=0, access=actions.Access.RO),
    ]
    macro = macros.recorded("mine", done)
    path = tmp_path / "mine.toml"
    path.write_text(macros.dumps(macro))
    again = macros.load(path)
    assert again.steps == macro.steps
    source = RecordingSource()
    run(again, source)
    assert source.applied == [item for item in done if not isinstance(item, tuple)]
