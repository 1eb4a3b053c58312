"""Snapshot files: what is read equals what was written, and what is no such file is named."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.synthetic import snapshot

from memconsole import differ, recording
from memconsole.actions import Release
from memconsole.errors import BadFile, NotFound, Refused
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.finding_kinds import KINDS
from memconsole.model import SNAPSHOT_VERSION, Snapshot
from memconsole.upgrading import upgraded

KEY = "region:web0"


def table() -> ExtentTable:
    rows = [Extent(0, 1000, 8, Flag.PRESENT), Extent(16, 2000, 512, Flag.PRESENT | Flag.HUGE)]
    return ExtentTable.from_rows(rows, first=0, pages=1024)


@pytest.fixture
def with_tables(tmp_path: Path) -> Path:
    path = tmp_path / "host.mcs"
    with table() as found:
        recording.write(path, snapshot(3, 2), {KEY: found})
    return path


def test_a_snapshot_is_json_and_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    written = recording.write(path, snapshot(5, 2))
    assert json.loads(path.read_text())["format"] == "memconsole.snapshot"
    found, tables = recording.read(path)
    assert found == written
    assert tables == {}


def test_tables_are_kept_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "host.mcs"
    with table() as mine:
        written = recording.write(path, snapshot(3, 2), {KEY: mine})
        found, tables = recording.read(path)
        with tables[KEY] as theirs:
            assert theirs.to_bytes() == mine.to_bytes()
        with zipfile.ZipFile(path) as archive:
            assert archive.read(f"extents/{KEY}.bin") == mine.to_bytes()
    assert found == written
    assert [(ref.key, ref.rows) for ref in found.tables] == [(KEY, 2)]


def test_the_schema_knows_no_negative_size() -> None:
    def integers(schema: object, name: str = "") -> Iterator[tuple[str, object]]:
        if isinstance(schema, list):
            for each in schema:
                yield from integers(each, name)
        if isinstance(schema, dict):
            if schema.get("type") == "integer":
                yield name, schema.get("minimum")
            for key, value in schema.items():
                yield from integers(value, name if key in {"anyOf", "items", "properties", "prefixItems"} else key)

    found = list(integers(recording.schema()))
    assert ("size", 0) in found
    assert {name for name, least in found if least is None} == {"node"}


def test_the_schema_is_the_published_one() -> None:
    published = Path(__file__).parents[2] / "docs" / "snapshot.schema.json"
    assert json.loads(published.read_text()) == recording.schema(), "make schema writes it anew"


def reindented(text: str) -> str:
    first, *others = text.split("\n")
    return "\n".join([first, *(f"    {line}" if line else line for line in others)])


def written_otherwise(schema: Any, described: Callable[[str], str]) -> Any:
    """The same schema as another release of msgspec writes it: other docstrings, other order of alternatives."""
    if isinstance(schema, list):
        return [written_otherwise(each, described) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: written_otherwise(value, described) for name, value in schema.items()}
    if isinstance(text := found.get("description"), str):
        found["description"] = described(text)
    if isinstance(choices := found.get("anyOf"), list):
        found["anyOf"] = choices[::-1]
    return found


@pytest.mark.parametrize("described", [reindented, str], ids=["indented", "as it is"])
def test_the_schema_is_the_same_whichever_msgspec_writes_it(described: Callable[[str], str]) -> None:
    published = json.loads((Path(__file__).parents[2] / "docs" / "snapshot.schema.json").read_text())
    other = written_otherwise(published, described)
    assert other != published
    assert recording.canonical(other) == published


def test_what_is_written_follows_the_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    path = tmp_path / "host.json"
    recording.write(path, snapshot(5, 2))
    jsonschema.validate(json.loads(path.read_text()), recording.schema())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    path.mkdir()
    with pytest.raises(BadFile, match="cannot be written"):
        recording.write(path, snapshot(1, 1))
    assert [found.name for found in tmp_path.iterdir()] == ["host.json"]
    with pytest.raises(BadFile, match="cannot be written"):
        recording.write(tmp_path / "nowhere" / "x", snapshot(1, 1))


def doctored(path: Path, **fields: object) -> Path:
    document = json.loads(msgspec.json.encode(snapshot(1, 1))) | fields
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x02\x01", "is not a recorded snapshot"),
        (b'{"hello": 1}', "is not a recorded snapshot"),
        (b"{}", "is not a recorded snapshot"),
        (b'{"format": "memconsole.snapshot", "ver', "is truncated"),
        (b'{"format": "memconsole.snapshot", "version": 1, "taken_ns": 5}', "is corrupt"),
        (b"{nonsense}", "is corrupt"),
        (b"PK\x03\x04 and then nothing", "is truncated"),
    ],
)
def test_what_is_no_snapshot_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=says):
        recording.read(path)


def test_what_is_no_regular_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) as reader:
        recording.write(pipe, snapshot())
        said = reader.communicate()[0]
    assert pipe.is_fifo()
    assert json.loads(said)["format"] == "memconsole.snapshot"


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    written = recording.write(tmp_path / "link", snapshot())
    assert (tmp_path / "link").is_symlink()
    assert recording.read(tmp_path / "real")[0] == written


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="is of version 99"):
        recording.read(doctored(tmp_path / "file", version=99, novelty={"x": 1}))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read"):
        recording.read(tmp_path / "none")


def test_a_foreign_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "letter.docx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(BadFile, match="is not a recorded snapshot"):
        recording.read(path)


def test_a_packed_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("snapshot.json", b" " * (1 << 20))
    with pytest.raises(BadFile, match="is not a recorded snapshot"):
        recording.read(path)


def test_a_table_that_is_named_and_missing_is_corruption(tmp_path: Path, with_tables: Path) -> None:
    path = tmp_path / "less"
    with zipfile.ZipFile(with_tables) as archive, zipfile.ZipFile(path, "w") as less:
        less.writestr("snapshot.json", archive.read("snapshot.json"))
    with pytest.raises(BadFile, match="lacks extents"):
        recording.read(path)


def test_truncation_anywhere_is_noticed(tmp_path: Path, with_tables: Path) -> None:
    whole = with_tables.read_bytes()
    path = tmp_path / "cut"
    for length in {0, 1, 2, 10, len(whole) // 2, len(whole) - 22, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            recording.read(path)


def same_or_refused(path: Path, damaged: bytes, expected: Snapshot, content: dict[str, bytes]) -> None:
    path.write_bytes(damaged)
    try:
        again, tables = recording.read(path)
    except BadFile:
        return
    assert again == expected
    assert {key: found.to_bytes() for key, found in tables.items()} == content
    for found in tables.values():
        found.close()


def read_whole(path: Path) -> tuple[Snapshot, dict[str, bytes]]:
    expected, tables = recording.read(path)
    content = {key: found.to_bytes() for key, found in tables.items()}
    for found in tables.values():
        found.close()
    return expected, content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(with_tables: Path, at: float, bit: int) -> None:
    damaged = bytearray(with_tables.read_bytes())
    damaged[int(at * len(damaged))] ^= 1 << bit
    same_or_refused(with_tables.with_name("damaged"), bytes(damaged), *read_whole(with_tables))


@pytest.mark.parametrize(("heading", "length"), [(b"PK\3\4", 30), (b"PK\1\2", 46), (b"PK\5\6", 22)])
def test_a_bit_flipped_anywhere_in_a_heading_of_the_archive_is_noticed_or_changes_nothing(
    with_tables: Path, heading: bytes, length: int
) -> None:
    whole = with_tables.read_bytes()
    known = read_whole(with_tables)
    start = whole.index(heading)
    for at in range(start, start + length):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            same_or_refused(with_tables.with_name("damaged"), bytes(damaged), *known)


def test_equal_snapshots_do_not_differ() -> None:
    assert differ.changes(snapshot(), snapshot()) == ()


def test_differences_name_table_entity_and_field() -> None:
    old = snapshot(3, 2, findings=0)
    region = old.regions[0]
    assert region.seen is not None
    seen = msgspec.structs.replace(region.seen, resident=7)
    new = msgspec.structs.replace(
        old, regions=(msgspec.structs.replace(region, seen=seen), *old.regions[2:]), guests=(*old.guests,)
    )
    changes = differ.changes(old, new)
    assert [(c.kind, c.table, c.key, c.field, c.new) for c in changes] == [
        ("removed", "regions", old.regions[1].name, "", None),
        ("changed", "regions", region.name, "seen.resident", 7),
    ]
    assert [c.kind for c in differ.changes(new, old)] == ["added", "changed"]


def test_a_recording_is_a_source_that_does_nothing(with_tables: Path) -> None:
    with closing(recording.Recording(with_tables)) as source:
        assert isinstance(source.snapshot(), Snapshot)
        assert source.read_only == "a recorded snapshot"
        assert source.label == "host.mcs"
        for _ in range(2):
            with source.extents(KEY) as found:
                assert len(found) == 2
        with pytest.raises(NotFound, match="region:none"):
            source.extents("region:none")
        assert [r.code for r in source.plan(Release("web0")).refusals] == ["ReadOnly"]
        with pytest.raises(Refused) as refused:
            source.apply(Release("web0"))
        assert refused.value.code == "ReadOnly"
        last = source.snapshot().events[-1].seq
        assert [event.seq for event in source.events(last - 1)] == [last]


def of_the_first_version() -> dict[str, Any]:
    """A snapshot as a memconsole of version 1 of the format wrote it."""
    document = msgspec.json.decode(msgspec.json.encode(snapshot(3, 2)))
    assert document["findings"]
    for finding in document["findings"]:
        finding["what"] = finding.pop("observed")
        del finding["risk"], finding["requirement"]
    return {**document, "version": 1, "tables": []}


def test_a_snapshot_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.snap"
    document = of_the_first_version()
    document["findings"][0]["id"] = "region-lost"
    path.write_bytes(msgspec.json.encode(document))
    found, _ = recording.read(path)
    assert [each.observed for each in found.findings] == [each["what"] for each in document["findings"]]
    assert found.findings[0].risk == KINDS["region-lost"].risk
    assert found.version == SNAPSHOT_VERSION
    assert upgraded(document)["findings"][0] != document["findings"][0], "what is upgraded stays as it is"


@pytest.mark.parametrize("version", [0, -(10**18), 10**18, "1", None])
def test_what_has_no_older_version_is_not_upgraded(version: object) -> None:
    document = {**of_the_first_version(), "version": version}
    assert upgraded(document) is document
    others: tuple[object, ...] = ([], 7, "x", None)
    for other in others:
        assert upgraded(other) is other
