"""The console without a terminal: every view as text and as SVG, the same for the same Snapshot."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from support.synthetic import SyntheticSource, snapshot

from memconsole.errors import NoControl, NotFound, UsageError
from memconsole.units import format_size
from memconsole.views.app import ConsoleApp
from memconsole.views.headless import render

VIEWS = [view.name for view in ConsoleApp.VIEWS]


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_text_of_the_size_asked_for(view: str) -> None:
    source = SyntheticSource()
    lines = render(source, view, "text", (100, 30)).splitlines()
    assert len(lines) == 30
    assert max(map(len, lines)) <= 100
    assert "host1" in lines[0]
    assert "14:13:20" in lines[0]


def test_text_holds_what_the_snapshot_holds() -> None:
    text = render(SyntheticSource(), "regions", "text", (132, 40))
    for region in snapshot().regions:
        assert region.name in text


@pytest.mark.parametrize("size", [(132, 43), (200, 60)])
def test_working_sets_and_fault_rates_are_seen_without_looking_for_them(size: tuple[int, int]) -> None:
    (lazy,) = [grant for grant in snapshot().grants if grant.faults]
    assert lazy.faults is not None
    assert f"lazy     1  {lazy.faults.rate} faults/s, {format_size(lazy.faults.present)}" in render(
        SyntheticSource(), "overview", "text", size
    )
    lines = render(SyntheticSource(), "grants", "text", size).splitlines()
    head = next(line for line in lines if "WSS" in line)
    row = next(line for line in lines if f" {lazy.id} " in line)
    for title, value in (("WSS", format_size(lazy.faults.present)), ("Faults/s", str(lazy.faults.rate))):
        assert row[: head.index(title) + len(title)].endswith(f" {value}")


def test_an_svg_is_well_formed_and_the_same_every_time() -> None:
    source = SyntheticSource()
    first = render(source, "pfn", "svg", (132, 50), "guest:web0")
    assert ET.fromstring(first).tag.endswith("svg")
    assert render(source, "pfn", "svg", (132, 50), "guest:web0") == first


def test_the_pfn_map_waits_for_its_scan() -> None:
    text = render(SyntheticSource(), "pfn", "text", (80, 24), "region:web0-ram0")
    assert "region:web0-ram0  64M" in text
    assert "scanning" not in text
    assert "█" in text


def test_what_does_not_exist_is_an_error_by_name() -> None:
    source = SyntheticSource()
    with pytest.raises(UsageError) as unknown:
        render(source, "nope", "text")
    for view in VIEWS:
        assert view in unknown.value.remedy
    with pytest.raises(NotFound):
        render(source, "pfn", "text", subject="region:nope")
    source.fail["snapshot"] = NoControl("no control process answers")
    with pytest.raises(NoControl):
        render(source, "regions", "text")


@pytest.mark.parametrize("subject", ["guest:nosuch", "region:nosuch", "grant:g99"])
def test_a_subject_that_is_not_there_is_an_error_by_name(subject: str) -> None:
    with pytest.raises(NotFound, match=f"there is no {subject}"):
        render(SyntheticSource(), "guests", "text", subject=subject)


def test_the_source_is_asked_for_one_snapshot_and_stays_open() -> None:
    source = SyntheticSource()
    render(source, "overview", "text")
    assert source.calls.count("snapshot") == 1
    assert not source.closed
