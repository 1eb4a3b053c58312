"""One action on several from the command line: what is meant, what is planned, what is asked, what is done."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from support.synthetic import SyntheticSource, snapshot

from memconsole import actions as do
from memconsole.cli import connect, main
from memconsole.cli.inside import Inside
from memconsole.errors import Gone, UsageError
from memconsole.model import Refusal


def run(source: SyntheticSource, words: Sequence[str]) -> int:
    with connect.using(source):
        return main(words)


def test_names_are_taken_in_their_order_and_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticSource(snapshot())
    names = [region.name for region in source.snapshot().regions][:3]
    assert run(source, ["each", "--yes", names[2], names[0], names[2], "--", "map", "db1", "--lazy"]) == 0
    assert source.applied == [do.Map(names[2], "db1", lazy=True), do.Map(names[0], "db1", lazy=True)]
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_filter_chooses_among_all_of_the_kind_that_the_action_takes() -> None:
    source = SyntheticSource(snapshot())
    wanted = [grant.id for grant in source.snapshot().grants if grant.guest == "web0"]
    assert len(wanted) > 1
    assert run(source, ["each", "--where", "guest=web0", "--yes", "--", "revoke", "--within", "2"]) == 0
    assert source.applied == [do.Revoke(id, within=2.0) for id in wanted]


def test_two_words_of_an_action_are_one() -> None:
    source = SyntheticSource(snapshot())
    assert run(source, ["each", "web0", "db1", "--yes", "--", "guest", "pause"]) == 0
    assert source.applied == [do.GuestPause("web0"), do.GuestPause("db1")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["each", "web0"], "each wants an action"),
        (["each", "web0", "--", "explode"], "no action"),
        (["each", "--", "guest", "pause"], "does not say which"),
        (["each", "web0", "--where", "name=web0", "--", "guest", "pause"], "does not say which"),
        (["each", "web0", "--", "handoff", "rehearse"], "cannot be done on each"),
        (["each", "web0", "--", "guest", "start"], "cannot be done on web0"),
        (["each", "nobody", "--", "guest", "pause"], "no nobody"),
        (["each", "--where", "name=nobody", "--", "guest", "pause"], "matches name=nobody"),
        (["each", "web0", "--", "guest", "pause", "--colour"], "--colour"),
        (["each", "web0", "db1", "--", "guest", "pause"], "must be confirmed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_meant_does_nothing(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticSource(snapshot())
    assert run(source, words) != 0
    assert said in capsys.readouterr().err
    assert source.applied == []


def test_a_dry_run_plans_each_and_does_none(capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticSource(snapshot())
    assert run(source, ["each", "web0", "db1", "--dry-run", "--", "guest", "pause"]) == 0
    said = capsys.readouterr().out
    assert "guest pause web0" in said
    assert "guest pause db1" in said
    source.refuse = (Refusal("NotNow", "it is not now", "because", ""),)
    assert run(source, ["each", "web0", "db1", "--dry-run", "--json", "--", "guest", "pause"]) == 3
    assert [each["plan"]["refusals"][0]["code"] for each in json.loads(capsys.readouterr().out)] == ["NotNow"] * 2
    assert run(source, ["each", "web0", "db1", "--yes", "--", "guest", "pause"]) == 3
    assert source.applied == []


def test_what_fails_is_told_and_the_exit_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    source = SyntheticSource(snapshot())
    source.fail = {"apply": Gone("web0 is gone", "it ended", "")}
    assert run(source, ["each", "web0", "db1", "--yes", "--", "guest", "pause"]) == 1
    assert capsys.readouterr().err.count("web0 is gone") == 2


def test_the_console_does_it_by_marks() -> None:
    """Its line plans such a command, but has it done with the rows marked."""
    source = SyntheticSource(snapshot())
    with pytest.raises(UsageError):
        Inside().run(["each", "web0", "--yes", "--", "guest", "pause"], source)
    assert "guest pause web0" in Inside().run(["each", "web0", "--dry-run", "--", "guest", "pause"], source).text
    assert source.applied == []
