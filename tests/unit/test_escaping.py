"""Text of others leaves the process with nothing in it that acts: on a terminal or in a log."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.spoiling import spoiled
from support.synthetic import SyntheticSource

from memconsole import cli, escaping, exporting, recording
from memconsole.cli import connect, output
from memconsole.errors import Refused
from memconsole.fields import TABLES
from memconsole.model import Danger, Effect, Outcome, Plan, Refusal, Snapshot

HOSTILE = "a\x1b[31mred\x1b]0;pwn\x07\n\rb\tc\x7f\x9b2J\x85\u202edesrever\u2066\u200b\u2028\udc80[/][bold]\\x1b"
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
"""What no face may let out; a newline ends a line, and is looked at apart."""


@given(st.text(st.characters(codec=None)))
def test_nothing_that_acts_is_left_and_all_else_stays(text: str) -> None:
    shown = escaping.escape(text)
    assert all(char.isprintable() or unicodedata.category(char) == "Zs" for char in shown)
    assert escaping.escape(shown) == shown
    shown.encode()
    if text.isprintable():
        assert shown == text


def test_each_kind_is_shown_in_the_form_of_its_width() -> None:
    assert escaping.escape("\x1b\x7f\x9b") == "\\x1b\\x7f\\x9b"
    assert escaping.escape("a\nb\tc\r") == "a\\nb\\tc\\r"
    assert escaping.escape("a\nb\x00", keep="\n") == "a\nb\\x00"
    assert escaping.escape("\u202e\udc80\U000e0001") == "\\u202e\\udc80\\U000e0001"
    assert escaping.escape("naïve 日本 ▸ a\u00a0b") == "naïve 日本 ▸ a\u00a0b"


@given(st.text())
def test_json_says_the_same(text: str) -> None:
    document = escaping.json(msgspec.json.encode({text: [text]}).decode())
    assert json.loads(document) == {text: [text]}
    assert not ACTS.search(document)


def test_a_log_line_is_one_line_and_a_trace_keeps_its_own() -> None:
    formatter = escaping.Formatter("%(levelname)s %(message)s")
    record = logging.LogRecord("a", logging.ERROR, "", 0, "%s", ("x\nERROR forged\x1b[2J",), None)
    assert formatter.format(record) == "ERROR x\\nERROR forged\\x1b[2J"
    try:
        int(HOSTILE)
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "m", (), (type(error), error, error.__traceback__))
    said = formatter.format(record)
    assert len(said.splitlines()) > 3
    assert not ACTS.search(said.replace("\n", ""))


# --- the faces of the command line ------------------------------------------------------------------------------


def hostile(value: Any) -> Any:
    """The same value with every text that is no word of the model in other words: those of somebody hostile."""
    return spoiled(value, lambda text: f"{text}{TELLING}", {"label", "tool"})


TELLING = HOSTILE.replace("\udc80", "")


@pytest.fixture
def shown_snapshot() -> Snapshot:
    snapshot: Snapshot = hostile(SyntheticSource().snapshot())
    return msgspec.structs.replace(snapshot, host=msgspec.structs.replace(snapshot.host, name=TELLING))


class Hostile(SyntheticSource):
    """A Source whose every sentence is somebody else's."""

    def plan(self, action: Any, after: Any = ()) -> Plan:
        refusal = Refusal("Taken", TELLING, TELLING, TELLING)
        return Plan("reserve", TELLING, Danger.CHANGES, (Effect(TELLING, TELLING),), (refusal,))

    def apply(self, action: Any) -> Outcome:
        raise Refused(TELLING, TELLING, TELLING)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: Any, shown_snapshot: Snapshot, tmp_path: Path) -> Any:
    recording.write(tmp_path / "a.snap", SyntheticSource().snapshot())
    recording.write(tmp_path / "b.snap", shown_snapshot)
    source = Hostile(shown_snapshot)
    source.close = lambda: None  # type: ignore[method-assign]
    monkeypatch.setattr(connect, "_connected", lambda *_, **__: source, raising=False)

    def run(*words: str) -> str:
        cli.main([word.replace("TMP", str(tmp_path)) for word in words])
        told = capsys.readouterr()
        return str(told.out + told.err)

    return run


COMMANDS = [
    ["inspect", "TMP/b.snap"],
    ["inspect", "TMP/b.snap", "--json"],
    ["diff", "TMP/a.snap", "TMP/b.snap"],
    ["diff", "TMP/a.snap", "TMP/b.snap", "--json"],
    ["snapshot", "--from", "TMP/b.snap"],
    ["snapshot", "--from", "TMP/b.snap", "--format", "text"],
    ["inspect", f"TMP/no{HOSTILE}".replace("\x00", "")],
    ["macro", "run", f"TMP/no{HOSTILE}.toml"],
    ["reserve", HOSTILE, "x"],
    [HOSTILE],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:30].encode("ascii", "replace").decode())
def test_no_face_of_the_command_line_lets_anything_out(said: Any, words: list[str]) -> None:
    told = said(*words)
    assert told
    assert not ACTS.search(told)


@pytest.mark.parametrize("table", TABLES)
def test_no_listing_lets_anything_out(capsys: Any, shown_snapshot: Snapshot, table: str) -> None:
    of = TABLES[table]
    rows = of.rows(shown_snapshot)
    for write in (output.table, lambda fields, rows: output.document(exporting.as_csv(fields, rows))):
        write(of.fields, rows)
        told = capsys.readouterr().out
        assert not ACTS.search(told)
        assert len(told.splitlines()) == len(rows) + 1, "a row is a line"


def test_no_sentence_of_a_plan_or_an_error_lets_anything_out(capsys: Any) -> None:
    source = Hostile()
    output.plan(source.plan(None))
    output.failure(Refused(TELLING, TELLING, TELLING), as_json=True)
    output.text(TELLING)
    output.note(TELLING)
    told = capsys.readouterr()
    assert not ACTS.search(told.out + told.err)
    assert "\\x1b[31mred" in told.out
