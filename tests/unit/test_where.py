"""The language that rows of a table are chosen by."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import synthetic

from memconsole import where
from memconsole.errors import UsageError
from memconsole.field import Table
from memconsole.fields import EVENTS, FINDINGS, REGIONS, TABLES, WINDOWS
from memconsole.guest_fields import GUESTS
from memconsole.units import parse_duration

SNAPSHOT = synthetic.snapshot()


def names(text: str, table: Table = REGIONS) -> list[str]:
    rows = where.choose(where.parse(text, table.fields), table.pick(None), table.rows(SNAPSHOT))
    return [table.key(row) for row in rows]


def expected(chosen: Callable[[Any], bool], table: Table = REGIONS) -> list[str]:
    return [table.key(row) for row in table.rows(SNAPSHOT) if chosen(row)]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("", lambda r: True),
        ("   ", lambda r: True),
        ("web", lambda r: "web" in r.name),
        ("WEB", lambda r: "web" in r.name),
        ('"web0"', lambda r: "web0" in r.name),
        ("state:mapped", lambda r: r.state == "mapped"),
        ("state:map", lambda r: r.state == "mapped"),
        ("state=map", lambda r: False),
        ("State=Mapped", lambda r: r.state == "mapped"),
        ("!state=mapped", lambda r: r.state != "mapped"),
        ("!!state=mapped", lambda r: r.state == "mapped"),
        ("state!=mapped", lambda r: r.state != "mapped"),
        ("name:web*", lambda r: r.name.startswith("web")),
        ("name=web?-ram0", lambda r: r.name == "web0-ram0"),
        ("name:*ram", lambda r: r.name.endswith("ram")),
        ("size>64M", lambda r: r.size > 64 << 20),
        ("size>=64M", lambda r: r.size >= 64 << 20),
        ("size<0x4000000", lambda r: r.size < 64 << 20),
        ("size<=64MiB", lambda r: r.size <= 64 << 20),
        ("size:64M", lambda r: r.size == 64 << 20),
        ("size=64M", lambda r: r.size == 64 << 20),
        ("size!=64M", lambda r: r.size != 64 << 20),
        ("page:4K", lambda r: r.page_size == 4096),
        ("!page:4K", lambda r: r.page_size != 4096),
        ("web size=64M", lambda r: "web" in r.name and r.size == 64 << 20),
        ("(web | spare) !mapped", lambda r: ("web" in r.name or "spare" in r.name) and r.state != "mapped"),
        ("web|spare", lambda r: "web" in r.name or "spare" in r.name),
        ("!(web | state:mapped)", lambda r: not ("web" in r.name or r.state == "mapped")),
        ("size>64M size<8G | name=spare6", lambda r: 64 << 20 < r.size < 8 << 30 or r.name == "spare6"),
        ("runs:-", lambda r: r.seen is None or r.seen.runs is None),
        ("runs>=0", lambda r: r.seen is not None and r.seen.runs is not None),
        ("!runs>=0", lambda r: r.seen is None or r.seen.runs is None),
    ],
)
def test_a_filter_finds_what_its_terms_say(text: str, chosen: Callable[[Any], bool]) -> None:
    assert names(text) == expected(chosen)


def test_of_a_field_with_several_values_one_is_enough() -> None:
    mapper = next(r.seen.mappers[0] for r in SNAPSHOT.regions if r.seen and r.seen.mappers)
    assert names(f"mappers={mapper}") == expected(lambda r: r.seen is not None and mapper in r.seen.mappers)


def test_a_device_address_is_a_text() -> None:
    window = SNAPSHOT.windows[0]
    assert window.id in names(window.id.rsplit(":", 1)[0], WINDOWS)


def test_times_and_durations_are_compared_as_they_are_written() -> None:
    assert names("at>1970-01-02", EVENTS) == expected(lambda e: True, EVENTS)
    assert names("at<1970-01-02", EVENTS) == []
    gaps = expected(lambda g: g.progress is not None and g.progress.gap_ns > 1_000_000, GUESTS)
    assert names("gap>1ms", GUESTS) == gaps


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("foo:bar", "there is no field 'foo'"),
        ("s:1", "'s' is more than one field"),
        ("size>many", "'many' cannot be compared with size"),
        ("size=many", "'many' cannot be compared with size"),
        ("state>mapped", "state is no number"),
        ("(web", "a ( that is not closed"),
        ("web)", "a ) that closes nothing"),
        ("web |", "lacks a term"),
        ("| web", "lacks a term"),
        ("()", "lacks a term"),
        ("web !", "a ! with nothing behind it"),
        ("(!) web", "a ! with nothing behind it"),
        ('"web', "a quote that does not end"),
        ('name:"web', "a quote"),
        ("(" * 40 + "web" + ")" * 40, "nested too deeply"),
        ("w" * 2000, "too long"),
    ],
)
def test_what_is_no_filter_is_told_by_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        where.parse(text, REGIONS.fields)
    assert what in str(caught.value)
    assert caught.value.remedy


@given(st.text(string.ascii_letters + string.digits + '()|!:=<>" *?.-', max_size=40))
def test_any_text_is_a_filter_or_a_usage_error(text: str) -> None:
    try:
        found = names(text)
    except UsageError:
        return
    assert set(found) <= set(names(""))


@given(
    st.sampled_from(["web", "state:mapped", "size>64M", "runs>10", "name:web*"]), st.sampled_from(["spare", "size<1G"])
)
def test_not_and_or_are_those_of_sets(a: str, b: str) -> None:
    every = set(names(""))
    assert set(names(f"!({a})")) == every - set(names(a))
    assert set(names(f"{a} | {b}")) == set(names(a)) | set(names(b))
    assert set(names(f"({a}) ({b})")) == set(names(a)) & set(names(b))


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.id)
def test_every_field_can_be_named_and_its_own_text_found(table: Table) -> None:
    for row in table.rows(SNAPSHOT)[:20]:
        for field in table.fields:
            text = field.text(row)
            if '"' not in text and not set("*?") & set(text) and text:
                chosen = where.choose(where.parse(f'{field.id}:"{text}"', table.fields), table.fields, [row])
                assert chosen == [row], (field.id, text)


def test_completions_are_fields_and_the_values_rows_have() -> None:
    fields, rows = REGIONS.fields, SNAPSHOT.regions
    assert where.completions("sta", fields, rows) == ["state:"]
    assert where.completions("web (!si", fields, rows) == ["web (!size:"]
    assert "state:mapped" in where.completions("state:", fields, rows)
    assert where.completions("web state=ma", fields, rows) == ["web state=mapped"]
    assert where.completions("", fields, rows) == []
    assert where.completions("nosuch:x", fields, rows) == []
    for text in where.completions("what:", FINDINGS.fields, SNAPSHOT.findings):
        where.parse(text, FINDINGS.fields)


@pytest.mark.parametrize(
    ("text", "ns"),
    [("250ms", 250_000_000), ("1.5s", 1_500_000_000), ("3", 3 * 10**9), ("2m", 120 * 10**9), ("7us", 7000)],
)
def test_durations(text: str, ns: int) -> None:
    assert parse_duration(text) == ns


@pytest.mark.parametrize("text", ["", "ms", "-1s", "1 fortnight", "9" * 100])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)
