"""Redaction: no name is left, the same name has the same pseudonym, and everything else stays as it was."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace
from support import synthetic

from memconsole import exporting
from memconsole.actions import Release
from memconsole.errors import BadFile, Refused, UsageError
from memconsole.fields import TABLES
from memconsole.model import Event, Finding, Helper, Severity, Snapshot
from memconsole.redaction import RedactedSource, Redactor


def host() -> Snapshot:
    made = synthetic.snapshot()
    web, *others = made.guests
    assert web.seen is not None
    block = replace(web.seen.ram[0], backing="/srv/acme/disk.img (deleted)")
    seen = replace(
        web.seen, comm="acme-db", ram=(block, *web.seen.ram[1:]), helpers=(Helper(9, 1, ("/opt/acme/fsd",)),)
    )
    return replace(
        made,
        guests=(replace(web, command=("/usr/bin/qemu", "-name", "acme"), seen=seen), *others),
        findings=(
            Finding("moved", Severity.ERROR, "region:web0-ram0", "frames of web0-ram0 moved, web0. ended"),
            Finding("gone", Severity.ERROR, "web0", "LUO session memconsole-web0 is open"),
        ),
        events=(Event(1, 1, "release", "acme-old", "region acme-old was freed", "uid 1000 pid 77"),),
    )


def test_no_name_is_left_and_it_is_a_snapshot_still() -> None:
    whole = host()
    told = msgspec.json.encode(Redactor().snapshot(whole))
    assert msgspec.json.decode(told, type=Snapshot)
    for name in (b"web", b"db1", b"cache", b"acme", whole.host.name.encode(), whole.host.boot_id.encode(), b"uid 1000"):
        assert name not in told


def test_a_name_has_one_pseudonym_wherever_it_stands() -> None:
    redactor = Redactor()
    told = redactor.snapshot(host())
    region, guest = told.regions[0].name, told.guests[0].name
    assert (region, guest) == ("region-1", "guest-1")
    assert told.findings[0].subject == f"region:{region}"
    assert told.findings[0].observed == f"frames of {region} moved, {guest}. ended"
    assert told.findings[1].observed == f"LUO session memconsole-{guest} is open"
    assert {grant.region for grant in told.grants} <= {each.name for each in told.regions}
    assert {grant.guest for grant in told.grants} <= {each.name for each in told.guests}
    assert redactor.snapshot(host()) == told
    assert redactor.name_of("region:region-1") == f"region:{host().regions[0].name}"


def test_what_is_no_name_stays() -> None:
    whole = host()
    told = Redactor().snapshot(whole)
    assert [region.size for region in told.regions] == [region.size for region in whole.regions]
    assert [grant.id for grant in told.grants] == [grant.id for grant in whole.grants]
    assert told.devices == whole.devices
    assert [finding.id for finding in told.findings] == [finding.id for finding in whole.findings]
    assert told.host.kernel == whole.host.kernel
    assert Redactor().text("/proc/12/maps and /sys/kernel/debug/kho") == "/proc/12/maps and /sys/kernel/debug/kho"


def test_a_guest_with_the_name_of_a_word_leaves_enumerations_alone() -> None:
    made = synthetic.snapshot(guests=1)
    named = replace(made, guests=(replace(made.guests[0], name="mapped"),))
    told = Redactor().snapshot(named)
    assert {str(region.state) for region in told.regions} == {str(region.state) for region in named.regions}
    assert msgspec.json.decode(msgspec.json.encode(told), type=Snapshot).guests[0].name == "guest-1"


def test_names_with_characters_of_their_own_are_found_as_a_whole() -> None:
    made = synthetic.snapshot(guests=1)
    named = replace(made, guests=(replace(made.guests[0], name="vm of acme"),))
    assert Redactor().snapshot(named).guests[0].name == "guest-1"


def test_a_redacted_source_shows_pseudonyms_finds_their_tables_and_changes_nothing() -> None:
    source = synthetic.SyntheticSource(synthetic.snapshot())
    redacted = RedactedSource(source)
    told = redacted.snapshot()
    key = f"region:{told.regions[0].name}"
    assert [*redacted.extents(key).rows(0, 3)] == [
        *source.extents("region:" + source.snapshot().regions[0].name).rows(0, 3)
    ]

    assert redacted.plan(Release("region-1")).refusals
    with pytest.raises(Refused):
        redacted.apply(Release("region-1"))


def test_every_format_has_every_row_and_column() -> None:
    table = TABLES["regions"]
    rows = synthetic.snapshot().regions
    fields = table.pick("name,size")
    assert exporting.as_csv(fields, rows).splitlines()[0] == "name,size"
    assert len(exporting.as_csv(fields, rows).splitlines()) == len(rows) + 1
    assert msgspec.json.decode(exporting.as_json(fields, rows)) == [{"name": r.name, "size": r.size} for r in rows]
    lines = exporting.text(fields, rows).splitlines()
    assert lines[0].split() == ["Name", "Size"]
    picture = exporting.svg(fields, rows)
    assert picture.count("<text ") == len(lines)
    assert all(row.name in picture for row in rows)


def test_a_picture_has_no_markup_of_others() -> None:
    row = replace(synthetic.snapshot().regions[0], name="<script>&")
    assert "<script>" not in exporting.svg(TABLES["regions"].pick("name"), [row])


def test_files_are_not_overwritten_and_their_names_say_the_format(tmp_path: object) -> None:
    path = f"{tmp_path}/rows.csv"
    assert exporting.format_of(path) == "csv"
    exporting.write(path, "a\n")
    with pytest.raises(BadFile, match="exists already"):
        exporting.write(path, "b\n")
    with pytest.raises(UsageError, match="has no format"):
        exporting.format_of("rows")


def test_numbers_and_times_are_wanted_largest_first_and_names_and_addresses_not() -> None:
    fields = {field.id: field for table in TABLES.values() for field in table.fields}
    assert all(fields[name].largest_first for name in ("size", "runs", "pid", "created", "cpu", "gap"))
    assert not any(fields[name].largest_first for name in ("name", "state", "gpa", "start"))
