"""Listings of the command line: columns, order, formats, redaction."""

from __future__ import annotations

import csv
import io
import json

import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole.cli import main
from memconsole.cli.connect import using
from memconsole.device_fields import DEVICES, device_rows
from memconsole.errors import ExitCode
from memconsole.units import format_size


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = ExitCode.DONE) -> str:
    with using(synthetic.SyntheticSource(synthetic.snapshot(regions=40))):
        assert main(words) == code
    return capsys.readouterr().out


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_columns_come_in_the_order_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "regions", "--columns", "size,name", "--csv").splitlines()[0] == "size,name"


def test_numbers_are_sorted_largest_first_and_names_from_a(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [each["size"] for each in json.loads(told(capsys, "regions", "--sort", "size", "--json"))]
    assert sizes == sorted(sizes, reverse=True)
    sizes = [each["size"] for each in json.loads(told(capsys, "regions", "--sort", "size", "--reverse", "--json"))]
    assert sizes == sorted(sizes)
    names = [each["name"] for each in rows(told(capsys, "regions", "--sort", "name", "--format", "csv"))]
    assert names == sorted(names)


def test_a_column_to_sort_by_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with using(synthetic.SyntheticSource(synthetic.snapshot())):
        assert main(["regions", "--sort", "colour"]) == ExitCode.USAGE
    assert "no field 'colour'" in capsys.readouterr().err


def test_rows_are_chosen_by_their_names_and_then_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(told(capsys, "regions", "--where", "name:web0*", "--csv", "--redact"))
    assert found
    assert all(row["name"].startswith("region-") for row in found)
    assert "web0" not in told(capsys, "guests", "--redact")


@pytest.mark.parametrize("format", ["text", "csv", "json", "svg"])
def test_every_format_has_the_same_rows(capsys: pytest.CaptureFixture[str], format: str) -> None:
    text = told(capsys, "regions", "--format", format, "--columns", "name,size")
    assert all(region.name in text for region in synthetic.snapshot(regions=40).regions)


def test_findings_are_told_one_by_one_and_listed_with_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert "remedy: " in told(capsys, "audit", code=ExitCode.FINDINGS)
    head = told(capsys, "audit", "--columns", "severity,id", code=ExitCode.FINDINGS).splitlines()[0]
    assert head.split() == ["Severity", "Finding"]


def test_a_redacted_snapshot_has_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "snapshot", "--redact")
    assert json.loads(text)["regions"][0]["name"] == "region-1"
    assert not any(guest.name in text for guest in synthetic.snapshot().guests)


def test_a_device_is_listed_with_its_windows_who_maps_them_and_whose_they_are() -> None:
    shown = synthetic.snapshot(windows=4)
    device = shown.devices[0]
    mine = [
        replace(window, holders=(42, 7), guest="db1") if window.bdf == device.bdf else window
        for window in shown.windows
    ]
    row = device_rows(replace(shown, windows=tuple(mine)))[0]
    text = {field.id: field.text(row) for field in DEVICES.fields}
    assert text["bdf"] == device.bdf
    assert text["class"].endswith(" storage")
    assert text["bars"] == ",".join(
        f"{each.bar}:{format_size(each.size)}{' io' if each.io else ''}" for each in row.windows
    )
    assert (text["mapped"], text["guest"]) == ("7,42", "db1")
    assert [window.bdf for window in row.windows] == [device.bdf] * len(row.windows)
