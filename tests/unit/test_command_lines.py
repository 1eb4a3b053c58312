"""Command lines inside of another face: what there is, what runs, what is written down, and macros of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import synthetic

from memconsole import actions, macros
from memconsole.cli import main
from memconsole.cli.inside import Inside
from memconsole.command import CommandForm
from memconsole.commandlog import NAME, CommandLog, macro_of
from memconsole.errors import ExitCode, UsageError

INSIDE = Inside()


def form(*words: str) -> CommandForm:
    return next(each for each in INSIDE.forms if each.words == words)


def test_every_action_and_every_listing_is_there_with_its_arguments() -> None:
    assert {form.action for form in INSIDE.forms} - {""} == set(actions.REGISTRY)
    for words in (("handoff", "check"), ("snapshot",), ("diff",), ("doctor",), ("inspect",), ("history", "commands")):
        assert form(*words).help
    reserve = form("reserve")
    assert [each.name for each in reserve.positional] == ["NAME", "SIZE"]
    assert next(each for each in reserve.options if each.name == "--page-size").choices == ("4K", "2M", "1G")
    assert next(each for each in reserve.options if each.name == "--prefault").takes is False


def test_what_has_the_terminal_to_itself_is_not_there_and_does_not_run() -> None:
    assert not {("demo",), ("serve",), ("open",)} & {each.words for each in INSIDE.forms}
    for words in (["demo"], ["serve"], [], ["macro", "record", "x"]):
        with pytest.raises(UsageError, match="inside of the console"):
            INSIDE.run(words, synthetic.SyntheticSource())


def test_a_command_runs_on_the_source_and_its_text_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    source = synthetic.SyntheticSource()
    told = INSIDE.run(["memconsole", "regions", "--columns", "name", "--json"], source)
    assert told.code == 0
    assert [each["name"] for each in json.loads(told.text)] == [region.name for region in source.snapshot().regions]
    assert not source.closed
    assert capsys.readouterr().out == ""
    assert INSIDE.run(["regions", "--sort", "colour"], source) == (
        ExitCode.USAGE,
        INSIDE.run(["regions", "--sort", "colour"], source).text,
    )
    assert "no field 'colour'" in INSIDE.run(["regions", "--sort", "colour"], source).text


def test_no_action_is_applied_without_its_plan() -> None:
    source = synthetic.SyntheticSource()
    with pytest.raises(UsageError, match="acts"):
        INSIDE.run(["reserve", "a", "4K", "--yes"], source)
    assert INSIDE.run(["reserve", "a", "4K", "--dry-run"], source).code == 0
    assert source.applied == []


def test_lines_are_kept_from_session_to_session_and_make_a_macro(tmp_path: Path) -> None:
    first = CommandLog(tmp_path, "1")
    first.add(1, "memconsole reserve a 4K")
    first.add(2, "memconsole regions --json")
    first.add(3, "memconsole release b", code=3)
    second = CommandLog(tmp_path, "2")
    second.add(4, "memconsole guest pause a")
    lines = CommandLog(tmp_path).lines
    assert [each.session for each in lines] == ["1", "1", "1", "2"]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    macro = macro_of("again", lines)
    assert [step.do for step in macro.steps] == ["reserve", "guest-pause"]
    assert macros.loads(macros.dumps(macro), "again").steps == macro.steps


def test_a_log_that_cannot_be_read_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{\n")
    log = CommandLog(tmp_path)
    assert "cannot be read" in log.trouble
    log.add(1, "memconsole now")
    assert (tmp_path / NAME).read_text() == "{\n"


def test_the_command_line_lists_them_and_writes_a_macro(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    CommandLog(tmp_path / "memconsole", "s").add(1_790_000_000_000_000_000, "memconsole reserve a 4K")
    assert main(["history", "commands", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["line"] == "memconsole reserve a 4K"
    assert main(["history", "commands", "--since", "2026-12-01T00:00:00", "--csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    file = tmp_path / "again.toml"
    assert main(["history", "commands", "--macro", str(file)]) == 0
    assert [step.do for step in macros.loads(file.read_text(), "again").steps] == ["reserve"]
