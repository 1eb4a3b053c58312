"""The recorded past: what is kept, how it is asked for by people and programs, and what a past Source does not do."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.served import ServedSource
from support.synthetic import NOW_NS, snapshot
from support.waiting import until

from memconsole import actions, cli
from memconsole.backend.diagnose.inspect import describe
from memconsole.backend.embedded import HISTORY_BYTES, embedded
from memconsole.backend.history.recorder import HistoryRecorder
from memconsole.backend.wire.client import Client
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.errors import BadFile, ExitCode, NotFound, Refused, UsageError
from memconsole.extents import Extent, ExtentTable, Flag
from memconsole.model import Snapshot
from memconsole.source import PastSource, ReadOnly, Source
from memconsole.units import format_time, parse_time
from memconsole.views.headless import FrozenSource

S = 10**9


def taken(seconds: float, regions: int = 2) -> Snapshot:
    return replace(snapshot(regions, 1), taken_ns=NOW_NS + int(seconds * S))


# --- recording ------------------------------------------------------------------------------------------------------


def test_snapshots_are_recorded_as_seldom_as_was_asked(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    for seconds in (0, 0.5, 0.999, 1.0, 1.5, 2.25):
        past.note(taken(seconds))
    assert [(time - NOW_NS) / S for time in past.times()] == [0, 1.0, 2.25]
    assert past.times(NOW_NS) == past.times()[1:]
    assert past.at(NOW_NS + 2 * S).taken_ns == NOW_NS + S
    past.close()
    past.note(taken(9))
    assert len(past.times()) == 3


def test_a_clock_that_goes_back_stops_nothing(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    past.note(taken(100))
    past.note(taken(0, regions=3))
    assert len(past.times()) == 2
    assert len(past.at(past.times()[-1]).regions) == 3
    past.close()


def test_without_recording_what_others_recorded_is_shown(tmp_path: Path) -> None:
    past, looker = HistoryRecorder(tmp_path, 1.0), HistoryRecorder(tmp_path)
    assert looker.times() == []
    past.note(taken(0))
    assert looker.at(NOW_NS) == past.at(NOW_NS)
    looker.note(taken(5))
    assert len(looker.times()) == 1
    past.close()
    looker.close()


def test_a_time_before_everything_is_named(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    with pytest.raises(NotFound, match="no snapshot was recorded") as caught:
        past.at(NOW_NS)
    assert caught.value.code == "NotRecorded"
    past.note(taken(0))
    with pytest.raises(NotFound, match="2026-09-21 14:13:20"):
        past.at(NOW_NS - 1)
    past.close()


def test_a_full_disk_is_a_finding_until_there_is_room(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    past.note(taken(0))

    assert past._recorder is not None
    assert past._recorder._database is not None
    (pages,) = past._recorder._database.execute("PRAGMA page_count").fetchone()
    past._recorder._database.execute(f"PRAGMA max_page_count = {pages}")
    past.note(replace(taken(1), host=replace(taken(1).host, name=os.urandom(50_000).hex())))
    (finding,) = past.findings()
    assert finding.id == "history-stopped"
    assert "No space left" in finding.evidence
    past.note(taken(2))
    assert past.findings() == ()
    assert [(time - NOW_NS) // S for time in past.times()] == [0, 2]
    past.close()


def test_a_snapshot_is_taken_for_the_history_where_nobody_else_takes_any(tmp_path: Path) -> None:
    with contextlib.closing(HistoryRecorder(tmp_path / "past", 1.0)) as past:

        def lacks(now: float, latest: float | None, own: float = -9) -> bool:
            seen = None if latest is None else NOW_NS + int(latest * S)
            return past.lacks(NOW_NS + int(now * S), seen, NOW_NS + int(own * S))

        assert lacks(0, None)
        past.note(taken(0))
        assert not lacks(0.9, 0)
        assert not lacks(1.03, 0)  # a console's next one comes a little later than the history looks
        assert lacks(1.03, 0, own=0)
        assert lacks(1.6, 0)
        past.note(taken(1.6))
        assert not lacks(2.6, 1.65, own=1.6)


# --- a control process of its own ----------------------------------------------------------------------------------


def test_an_embedded_one_records_into_a_directory_of_its_own_that_goes_with_it(tmp_path: Path) -> None:
    control = embedded(tmp_path / "run", record_s=0.25)
    try:
        until(lambda: bool(control.history()), "it records of itself")
        (first, *_) = control.history()
        assert control.at(first).taken_ns == first
        assert (tmp_path / "run" / "history").is_dir()
        assert control._past is not None
        assert control._past._recorder is not None
        assert control._past._recorder._max_bytes == HISTORY_BYTES
    finally:
        control.close()
    assert not (tmp_path / "run").exists()


def test_one_that_records_nothing_says_so(tmp_path: Path) -> None:
    with contextlib.closing(embedded(tmp_path / "run")) as control:
        control.snapshot()
        assert control.history() == []
        with pytest.raises(NotFound, match="serve records"):
            control.at(NOW_NS)
    assert not (tmp_path / "run").exists()


# --- every other Source --------------------------------------------------------------------------------------------


@pytest.fixture
def source() -> ServedSource:
    made = ServedSource(taken(10))
    made.recorded = [taken(0), taken(1, regions=3), taken(2, regions=4)]
    return made


def test_every_source_hands_the_history_on(source: ServedSource, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        serving = serve_in_thread(source, tmp_path / "control")
        stack.callback(serving.close)
        client = stack.enter_context(contextlib.closing(Client(tmp_path / "control")))
        faces: list[Source] = [
            client,
            ReadOnly(source, "no"),
            FrozenSource(source),
            PastSource(source, source.recorded[0]),
        ]
        for face in faces:
            assert list(face.history()) == [shown.taken_ns for shown in source.recorded]
            assert list(face.history(NOW_NS + S)) == [NOW_NS + 2 * S]
            assert face.at(NOW_NS + S + 1) == source.recorded[1]
            with pytest.raises(NotFound) as caught:
                face.at(NOW_NS - 1)
            assert caught.value.code == "NotRecorded"


def test_a_moment_is_looked_at_and_not_changed(source: ServedSource) -> None:
    moment = PastSource(source, source.recorded[1])
    assert moment.snapshot() is source.recorded[1]
    assert "2026-09-21 14:13:21" in moment.read_only
    with pytest.raises(NotFound, match="no PFN map"):
        moment.extents(f"region:{source.snapshot().regions[0].name}")
    assert [refusal.code for refusal in moment.plan(actions.Release("web")).refusals] == ["ReadOnly"]
    with pytest.raises(Refused):
        moment.apply(actions.Release("web"))
    assert source.applied == []


def test_the_map_of_a_moment_is_the_last_that_was_scanned_until_then_of_the_same_region(source: ServedSource) -> None:
    shown = source.recorded[1]
    key, name = f"region:{shown.regions[0].name}", shown.regions[0].name
    source.recorded_rows[key] = [(NOW_NS - 5 * S, [Extent(0, 7, 1, int(Flag.PRESENT))])]
    with PastSource(source, shown).extents(key) as table:
        assert (table.scanned_ns, table[0].pfn) == (NOW_NS - 5 * S, 7)
    later = replace(shown, regions=(replace(shown.regions[0], created_ns=NOW_NS - 2 * S), *shown.regions[1:]))
    with pytest.raises(NotFound, match="no PFN map") as caught:
        PastSource(source, later).extents(f"region:{name}")
    assert "of another that had its name" in caught.value.why


# --- PFN maps ---------------------------------------------------------------------------------------------------------


def scanned(seconds: float, *pfns: int) -> ExtentTable:
    table = ExtentTable.from_rows(Extent(page, pfn, 1, int(Flag.PRESENT)) for page, pfn in enumerate(pfns))
    table.scanned_ns = NOW_NS + int(seconds * S)
    return table


def noted(past: HistoryRecorder, *tables: tuple[str, ExtentTable]) -> dict[str, int]:
    """Record these, as the control process has them; what was asked for."""
    asked: dict[str, int] = {}

    def since(known: Mapping[str, int]) -> list[tuple[str, ExtentTable]]:
        asked.update(known)
        return list(tables)

    past._map_due.clear()
    past.note_maps(since)
    return asked


def test_maps_that_were_scanned_are_recorded_where_they_differ(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    assert noted(past, ("region:web", scanned(0, 7, 8)), ("guest:db1", scanned(0, 9))) == {}
    known = noted(past, ("region:web", scanned(10, 7, 8)))
    assert known == {"region:web": NOW_NS, "guest:db1": NOW_NS}
    noted(past, ("region:web", scanned(20, 7, 5)))

    def at(seconds: float) -> tuple[float, list[int]]:
        with past.map_at("region:web", NOW_NS + int(seconds * S)) as table:
            return (table.scanned_ns - NOW_NS) / S, [row.pfn + page for row in table for page in range(row.count)]

    assert at(0) == at(9) == (0, [7, 8])
    assert at(10) == at(19.9) == (10, [7, 8])
    assert at(20) == at(1000) == (20, [7, 5])
    with pytest.raises(NotFound, match="no PFN map of region:web is recorded") as caught:
        at(-1)
    assert f"the first of it was at {format_time(NOW_NS)}" in caught.value.why
    with pytest.raises(NotFound, match="no PFN map of region:db is recorded"):
        past.map_at("region:db", NOW_NS + S)
    past.note(taken(30))
    past.close()
    said = describe(tmp_path / "snapshots.sqlite")
    assert (said.facts["pfn_maps"], said.facts["snapshots"], said.findings) == (3, 1, ())


def test_maps_have_a_share_of_the_history_and_the_oldest_go_first(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0, max_bytes=1 << 20)
    for seconds in range(6):
        noise = [int.from_bytes(os.urandom(4), "little") for _ in range(12_000)]
        noted(past, ("region:web", scanned(seconds, *noise)))
    with pytest.raises(NotFound):
        past.map_at("region:web", NOW_NS)
    past.map_at("region:web", NOW_NS + 5 * S).close()
    noise = [int.from_bytes(os.urandom(4), "little") for _ in range(80_000)]
    noted(past, ("region:huge", scanned(9, *noise)))
    with pytest.raises(NotFound):
        past.map_at("region:huge", NOW_NS + 9 * S)
    assert past.findings() == ()
    past.close()


def test_a_map_that_is_damaged_on_disk_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    noted(past, ("region:web", scanned(0, 7)), ("region:db", scanned(0, 9)))
    past.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "snapshots.sqlite")) as database:
        (payload,) = database.execute("SELECT payload FROM maps WHERE key = 'region:db'").fetchone()
        database.execute("UPDATE maps SET payload = ? WHERE key = 'region:web'", (payload,))
        database.commit()
    looker = HistoryRecorder(tmp_path)
    with pytest.raises(BadFile, match="the PFN map of region:web"):
        looker.map_at("region:web", NOW_NS)
    looker.map_at("region:db", NOW_NS).close()
    looker.close()
    (finding,) = describe(tmp_path / "snapshots.sqlite").findings
    assert "region:web" in finding.observed


def test_a_map_of_the_past_comes_over_the_wire_with_when_it_was_scanned(source: ServedSource, tmp_path: Path) -> None:
    source.recorded_rows["region:web"] = [(NOW_NS + S, [Extent(0, 7, 1, int(Flag.PRESENT))])]
    with contextlib.ExitStack() as stack:
        serving = serve_in_thread(source, tmp_path / "control")
        stack.callback(serving.close)
        client = stack.enter_context(contextlib.closing(Client(tmp_path / "control")))
        with client.extents("region:web", NOW_NS + 2 * S) as table:
            assert (table.scanned_ns, table[0].pfn) == (NOW_NS + S, 7)
        with pytest.raises(NotFound) as caught:
            client.extents("region:web", NOW_NS)
        assert caught.value.code == "NotRecorded"


# --- times as people write them -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("-5m", -300),
        ("-1.5h", -5400),
        ("-2d", -172_800),
        ("14:13:20", 0),
        ("14:13", -20),
        ("2026-09-21T14:13:20", 0),
        ("2026-09-21 14:13:20.25", 0.25),
        ("2026-09-21T16:13:20+02:00", 0),
        ("1790000000", 0),
        ("1790000000.5", 0.5),
        (str(NOW_NS), 0),
    ],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text, NOW_NS) == NOW_NS + int(seconds * S)


@pytest.mark.parametrize("text", ["", "-5", "5m", "yesterday", "25:00", "2026-13-01", "-m", "0x10", "12"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a time"):
        parse_time(text, NOW_NS)


def test_a_time_that_is_written_is_read_back() -> None:
    assert parse_time(format_time(NOW_NS + 7_000_000).removesuffix(" UTC"), NOW_NS) == NOW_NS + 7_000_000


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def words(source: ServedSource, tmp_path: Path) -> list[str]:
    return ["--socket", str(tmp_path / "control")]


def test_the_command_line_lists_shows_and_compares(
    source: ServedSource, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = serve_in_thread(source, tmp_path / "control")
    try:
        assert cli.main([*words, "history", "list", "--json"]) == ExitCode.DONE
        listed = json.loads(capsys.readouterr().out)
        assert [row["taken_ns"] for row in listed] == source.history()
        assert [row["apart_ns"] for row in listed] == [None, S, S]
        assert cli.main([*words, "history", "list", "--since", format_time(NOW_NS + S)[:-4]]) == ExitCode.DONE
        assert len(capsys.readouterr().out.splitlines()) == 3
        assert cli.main([*words, "history", "show", str(NOW_NS + S)]) == ExitCode.DONE
        assert json.loads(capsys.readouterr().out)["taken_ns"] == NOW_NS + S
        assert cli.main([*words, "history", "show", "-1s", "--format", "text", "--view", "regions"]) == ExitCode.DONE
        picture = capsys.readouterr().out
        assert source.recorded[2].regions[3].name in picture
        assert "PAST" in picture
        assert "live" not in picture
        assert cli.main([*words, "diff", f"@{NOW_NS}", "@-1s"]) == ExitCode.DONE
        changes = capsys.readouterr().out.splitlines()
        assert [line for line in changes if line.startswith("+ regions")] == [
            f"+ regions {region.name}" for region in source.recorded[2].regions[2:]
        ]
        name = source.snapshot().regions[0].name
        source.recorded_rows[f"region:{name}"] = [(NOW_NS, [Extent(0, 7, 1, int(Flag.PRESENT))])]
        assert cli.main([*words, "pfn", f"region:{name}", "--json", "--at", "-9d"]) == ExitCode.DONE
        shown = json.loads(capsys.readouterr().out)
        assert (shown["scanned_ns"], shown["extents"][0]["pfn"]) == (NOW_NS, 7)
        assert cli.main([*words, "history", "show", "-9d"]) == ExitCode.DONE  # the synthetic clock is in the future
        assert cli.main([*words, "history", "show", "2000-01-01"]) == ExitCode.FAILED
        assert "nothing is recorded" in capsys.readouterr().err
        assert cli.main([*words, "history", "show", "tomorrow"]) == ExitCode.USAGE
    finally:
        serving.close()


def test_inspect_says_what_a_file_is_and_exits_with_4_where_it_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    past = HistoryRecorder(tmp_path, 1.0)
    past.note(taken(0))
    past.note(taken(1))
    past.close()
    file = tmp_path / "snapshots.sqlite"
    assert cli.main(["inspect", str(file)]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "history, version 2" in said
    assert "snapshots: 2" in said
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE frames SET payload = x'78' WHERE key > (SELECT min(key) FROM frames)")
        database.commit()
    assert cli.main(["inspect", "--json", str(file)]) == ExitCode.FINDINGS
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["snapshots"] == 1
    assert [finding["id"] for finding in found["findings"]] == ["history-damaged"]
    (tmp_path / "foreign").write_text("hello")
    assert cli.main(["inspect", str(tmp_path / "foreign")]) == ExitCode.FAILED
