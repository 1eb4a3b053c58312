"""Macros: what is written is what is done, and a failure in the middle says what was done and what not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memconsole import actions, macro_run, macros
from memconsole.actions import Action
from memconsole.arguments import ArgumentKind
from memconsole.errors import BadFile, MacroError, MacroUsage, Refused
from memconsole.macro_run import Face, Ran
from memconsole.macros import Macro
from memconsole.model import Access, Danger, Outcome, Plan, Refusal

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
        self.refuse_plan = ""
        self.after: list[tuple[str, ...]] = []

    def plan(self, action: Action, after: Sequence[Action] = ()) -> Plan:
        self.after.append(tuple(actions.cli_form(each) for each in after))
        refusals = (Refusal("Told", "told to"),) if action.spec.id == self.refuse_plan else ()
        return Plan(action.spec.id, actions.cli_form(action), Danger.CHANGES, refusals=refusals, subject="g7")

    def apply(self, action: Action) -> Outcome:
        if action.spec.id == self.refuse:
            raise Refused("no", "told to", "do not", code="Told")
        self.applied.append(action)
        return Outcome(action.spec.id, f"g{len(self.applied)}", "done")


def run(macro: Macro, source: Any, **given: str) -> list[macro_run.StepResult]:
    return list(macro_run.run(macro, source, given))


def test_parameters_and_saved_names_reach_the_actions() -> None:
    source = RecordingSource()
    opened: list[tuple[str, str]] = []
    macro = macros.loads(WEB, "web")
    results = list(macro_run.run(macro, source, {"name": "w"}, Face(lambda *view: opened.append(view))))  # type: ignore[arg-type]
    assert source.applied == [
        actions.Reserve("w", 64 << 20, page_size=2 << 20),
        actions.Map("w", "db1"),
        actions.Revoke("g2", within=0.5),
    ]
    assert opened == [("regions", "region:w")]
    macro_run.verdict(macro, results)


def test_a_failure_in_the_middle_stops_and_says_what_was_done() -> None:
    source = RecordingSource(refuse="map")
    macro = macros.loads(WEB, "web")
    results = run(macro, source, name="w")
    assert [bool(result.error) for result in results] == [False, True, False, False]
    assert [result.skipped for result in results] == [False, False, True, True]
    with pytest.raises(MacroError, match=r"step 2 failed.*done: 1; failed: 2; not begun: 3, 4"):
        macro_run.verdict(macro, results)


def test_continue_goes_on_and_a_name_that_was_never_saved_is_its_own_error() -> None:
    source = RecordingSource(refuse="map")
    results = run(macros.loads('on_failure = "continue"\n' + WEB, "web"), source, name="w")
    assert [result.code for result in results] == ["", "Told", "", "NotSaved"]
    assert not any(result.skipped for result in results)


def test_a_dry_run_changes_nothing_and_shows_every_plan() -> None:
    source = RecordingSource()
    results = list(macro_run.dry_run(macros.loads(WEB, "web"), source, {"name": "w"}))  # type: ignore[arg-type]
    assert source.applied == []
    assert [result.plan.action for result in results if result.plan] == ["reserve", "map", "revoke"]
    assert source.after == [(), (results[0].cli,), tuple(result.cli for result in results[:2])]
    assert results[3].cli == "memconsole revoke g7 --within 0.5"


def test_parameters_are_checked_before_anything_is_done() -> None:
    source = RecordingSource()
    macro = macros.loads(WEB, "web")
    with pytest.raises(MacroUsage, match="needs name"):
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
        ("[[step]]\nview = 'regions'\ndo = 'release'", "either do, view or run"),
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
        actions.Map("a$b", "vm", offset=4096, gpa=0, access=Access.RO),
    ]
    macro = macros.recorded("mine", done)
    path = tmp_path / "mine.toml"
    path.write_text(macros.dumps(macro))
    again = macros.load(path)
    assert again.steps == macro.steps
    source = RecordingSource()
    run(again, source)
    assert source.applied == [item for item in done if not isinstance(item, tuple)]


def test_steps_are_shown_with_the_values_of_their_parameters() -> None:
    macro = macros.loads(WEB, "web")
    results = list(macro_run.dry_run(macro, RecordingSource(), {"name": "w"}))  # type: ignore[arg-type]
    assert results[0].text.startswith("reserve name=w size=64M")
    assert not any("${name}" in result.text for result in results)


def test_a_step_after_one_that_is_refused_is_planned_without_it_and_says_so() -> None:
    source = RecordingSource()
    source.refuse_plan = "map"
    results = list(macro_run.dry_run(macros.loads(WEB, "web"), source, {"name": "w"}))  # type: ignore[arg-type]
    assert source.after[-1] == ("memconsole reserve w 64M --page-size 2M",)
    assert [bool(result.note) for result in results] == [False, False, True, True]
    assert (results[3].code, results[3].text) == ("NotSaved", "revoke grant=<grant of step 2> within=0.5")


def test_the_rest_of_a_macro_that_failed_is_run_with_what_was_saved() -> None:
    source = RecordingSource(refuse="revoke")
    macro = macros.loads(WEB, "web")
    results = run(macro, source, name="w")
    rest = macro_run.rest_of(macro, results, {"name": "w"})
    assert rest == macro_run.Rest((4,), {"name": "w", "grant": "g2"})
    assert rest.cli("web", yes=True) == "memconsole macro run web --steps 4 --set name=w --set grant=g2 --yes"
    source.refuse = ""
    again = list(macro_run.run(macro, source, rest.given, steps=rest.steps))  # type: ignore[arg-type]
    assert source.applied[-1] == actions.Revoke("g2", within=0.5)
    assert macro_run.rest_of(macro, again, rest.given) is None
    with pytest.raises(MacroUsage, match="no step 9"):
        list(macro_run.run(macro, source, rest.given, steps=(9,)))  # type: ignore[arg-type]


def test_a_step_at_a_time_is_done_left_out_or_the_end() -> None:
    source = RecordingSource()
    macro = macros.loads(WEB, "web")
    said = iter(["do", "skip", "stop"])
    face = Face(decide=lambda *_: next(said))  # type: ignore[arg-type]
    results = list(macro_run.run(macro, source, {"name": "w"}, face))  # type: ignore[arg-type]
    assert [result.code for result in results] == ["", "Skipped", "Stopped", ""]
    assert [result.done for result in results] == [True, False, False, False]
    assert source.applied == [actions.Reserve("w", 64 << 20, page_size=2 << 20)]


def test_a_command_is_run_with_its_values_each_in_one_word_and_its_exit_code_is_the_macros() -> None:
    macro = macros.loads("[params.where]\n[[step]]\nrun = \"audit --where '${where}' --json\"\n", "nightly")
    asked: list[list[str]] = []

    def command(words: Sequence[str]) -> Ran:
        asked.append(list(words))
        return Ran(4, "two findings")

    given = {"where": "severity=error id:a*"}
    results = list(macro_run.run(macro, RecordingSource(), given, Face(command=command)))  # type: ignore[arg-type]
    assert asked == [["audit", "--where", "severity=error id:a*", "--json"]]
    assert (results[0].error[-24:], macro_run.exit_code(results)) == (" ended with 4 (findings)", 4)
    (planned,) = macro_run.dry_run(macro, RecordingSource(), given)  # type: ignore[arg-type]
    assert planned.cli == "memconsole audit --where 'severity=error id:a*' --json"
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["release web", "guest stop db", "serve", "", "audit 'x", "handoff run"])
def test_a_command_that_acts_or_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(MacroUsage):
        macros.loads(f'[[step]]\nrun = "{text}"\n', "m")


def test_a_parameter_is_checked_as_the_argument_it_stands_for() -> None:
    macro = macros.loads(WEB, "web")
    assert {name: field.arg.kind for name, field in macros.fields_of(macro).items()} == {
        "name": ArgumentKind.NEW_NAME,
        "size": ArgumentKind.SIZE,
    }
    with pytest.raises(MacroUsage, match=r"size: .*not a size"):
        macro_run.settings_for(macro, {"name": "w", "size": "64Q"})


def test_every_macro_of_the_library_is_listed_and_can_be_planned() -> None:
    from memconsole.cli.parser import parse

    found, broken = macros.discover([macros.LIBRARY])
    assert broken == ()
    assert {"drain-guest", "rehearse-then-handoff", "nightly-audit", "bug-report"} <= {each.name for each in found}
    for macro in found:
        assert macro.title
        assert not macro.key, "a key of the library would take one from somebody"
        given = {name: param.default or "x" for name, param in macro.params.items()}
        values = macro_run.settings_for(macro, given)
        for step in macro.steps:
            if step.run:
                parse(macro_run.words_of(step, values))


def test_commands_of_a_macro_are_those_that_look() -> None:
    from memconsole.cli.parser import build

    commands = next(each for each in build()._actions if isinstance(each.choices, dict)).choices
    assert isinstance(commands, dict)
    assert set(commands) >= macros.LOOKING
