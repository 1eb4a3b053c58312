"""The history: what was recorded is walked both ways, bounded, and never believed behind damage."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import synthetic

from memconsole.backend import history, leafdelta
from memconsole.backend.history import Cursor, History, Recorder
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.model import Event, Snapshot

SECOND = 10**9


def moment(n: int) -> Snapshot:
    """A host as it changes: a guest's progress, a resident size, an event, a region that comes and goes."""
    base = synthetic.snapshot(6 if n % 10 < 5 else 5, 2, events=3, beats=1000 + 13 * n)
    regions = tuple(
        msgspec.structs.replace(region, seen=msgspec.structs.replace(region.seen, resident=n * 4096 * (at + 1)))
        for at, region in enumerate(base.regions)
    )
    events = tuple(Event(n // 4 + k, n, "x", "y", f"event {n // 4 + k}") for k in range(5))
    host = msgspec.structs.replace(base.host, uptime_s=float(n))
    return msgspec.structs.replace(
        base, taken_ns=(n + 1) * SECOND, regions=regions, events=events, host=host, tables=()
    )


def recorded(directory: Path, count: int, **bounds: int) -> list[Snapshot]:
    recorder = Recorder(directory, **bounds)
    snapshots = [moment(n) for n in range(count)]
    for snapshot in snapshots:
        recorder.record(snapshot)
    recorder.close()
    return snapshots


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "FRAMES_A_FILE", 8)


def test_every_snapshot_is_read_back_at_its_time(tmp_path: Path) -> None:
    snapshots = recorded(tmp_path, 30)
    found = History(tmp_path)
    assert found.times() == [snapshot.taken_ns for snapshot in snapshots]
    assert len(found.files()) == 4
    for snapshot in snapshots:
        assert found.at(snapshot.taken_ns) == snapshot
        assert found.at(snapshot.taken_ns + SECOND - 1) == snapshot
    assert found.at(1 << 62) == snapshots[-1]
    with pytest.raises(NotFound):
        found.at(SECOND - 1)
    assert found.nbytes() == sum(path.stat().st_size for path, _ in found.files())


def test_a_cursor_walks_both_ways_over_files(tmp_path: Path) -> None:
    snapshots = recorded(tmp_path, 20)
    cursor = Cursor(History(tmp_path))
    assert cursor.previous() is None
    assert cursor.next() is None
    assert cursor.seek(5 * SECOND) == snapshots[4]
    for n in range(5, 20):
        assert cursor.next() == snapshots[n]
    assert cursor.next() is None
    assert cursor.key == 20 * SECOND
    for n in range(18, -1, -1):
        assert cursor.previous() == snapshots[n]
    assert cursor.previous() is None
    assert cursor.key == SECOND


def test_a_cursor_at_the_end_sees_what_is_recorded_next(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record(moment(0))
    cursor = Cursor(History(tmp_path))
    assert cursor.seek(1 << 62) == moment(0)
    for n in range(1, 12):
        assert cursor.next() is None
        recorder.record(moment(n))
        assert cursor.next() == moment(n)
    recorder.close()


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no snapshot"):
        History(tmp_path / "nothing").at(1)


def test_a_clock_that_goes_back_does_not_reorder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for n in (5, 3, 3, 9):
        recorder.record(moment(n))
    recorder.close()
    found = History(tmp_path)
    assert found.times() == [6 * SECOND, 6 * SECOND + 1, 6 * SECOND + 2, 10 * SECOND]
    assert [found.at(at).taken_ns for at in found.times()] == [6 * SECOND, 4 * SECOND, 4 * SECOND, 10 * SECOND]


def test_it_is_bounded_by_bytes(tmp_path: Path) -> None:
    limit = 60_000
    snapshots = recorded(tmp_path, 200, max_bytes=limit)
    found = History(tmp_path)
    assert found.nbytes() <= limit
    assert found.times()[-1] == snapshots[-1].taken_ns
    assert 20 < len(found.times()) < 200
    assert found.at(found.times()[0]).taken_ns == found.times()[0]


def test_it_is_bounded_by_age_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    recorded(tmp_path, 40)
    recorder = Recorder(tmp_path, max_age_ns=20 * SECOND)
    recorder.record(moment(45))
    recorder.close()
    times = History(tmp_path).times()
    assert times[-1] == 46 * SECOND
    assert 26 * SECOND - 8 * SECOND <= times[0] <= 26 * SECOND


def test_there_is_one_writer(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    with pytest.raises(Refused) as caught:
        Recorder(tmp_path)
    assert caught.value.code == "HistoryTaken"
    first.close()
    Recorder(tmp_path).close()


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    recorded(tmp_path / "made", 1)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "made").iterdir())


def last_file(directory: Path) -> Path:
    return max(directory.glob("*.history"))


def test_cut_at_any_byte_of_its_last_file_the_whole_frames_stay(tmp_path: Path) -> None:
    snapshots = recorded(tmp_path, 11)
    path = last_file(tmp_path)
    whole = path.read_bytes()
    index = history.read_index(path)
    ends = [frame.offset + frame.length for frame in index.frames]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        left = 8 + sum(end <= cut for end in ends)
        found = History(tmp_path)
        assert len(found.times()) == left
        assert found.at(1 << 62) == snapshots[left - 1]
        assert bool(found.damaged) == (cut not in (*ends, history._START.size))


@pytest.mark.parametrize("cut", [0, 7, 16, 20, 40, 60, -1])
def test_a_recorder_cuts_what_is_torn_says_so_and_goes_on(tmp_path: Path, cut: int) -> None:
    snapshots = recorded(tmp_path, 11)
    path = last_file(tmp_path)
    os.truncate(path, cut if cut >= 0 else path.stat().st_size - 1)
    left = 8 if cut >= 0 else 10
    recorder = Recorder(tmp_path)
    if cut != history._START.size:
        assert [finding.id for finding in recorder.findings] == ["history-damaged"]
    recorder.record(moment(50))
    recorder.close()
    found = History(tmp_path)
    assert found.damaged == {}
    assert found.times() == [snapshot.taken_ns for snapshot in snapshots[:left]] + [51 * SECOND]
    assert found.at(1 << 62) == moment(50)


def test_a_bit_that_flips_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    snapshots = recorded(tmp_path, 3)
    path = last_file(tmp_path)
    whole = path.read_bytes()
    for byte in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << byte % 8
        path.write_bytes(flipped)
        found = History(tmp_path)
        for n, key in enumerate(found.times()):
            try:
                assert found.at(key) == snapshots[n]
            except BadFile:
                break
        else:
            assert found.damaged or byte in range(12, 16), byte


@pytest.mark.parametrize("content", [b"\x7fELF" * 100, b"MCHISTRY\x09\0\0\0\0\0\0\0" + bytes(50)])
def test_a_foreign_or_newer_file_is_left_alone_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"{SECOND:020d}.history"
    path.write_bytes(content)
    recorder = Recorder(tmp_path)
    assert [finding.subject for finding in recorder.findings] == [path.name]
    recorder.record(moment(5))
    recorder.close()
    assert path.read_bytes() == content
    with pytest.raises(BadFile):
        history.read_index(path)


def test_a_full_disk_is_said_and_nothing_half_is_left(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record(moment(0))
    size = last_file(tmp_path).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(KernelRefused):
            recorder.record(moment(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
        with pytest.raises(KernelRefused):
            recorder.record(moment(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.record(moment(3))
    recorder.close()
    found = History(tmp_path)
    assert found.damaged == {}
    assert [found.at(key) for key in found.times()] == [moment(0), moment(3)]


def test_a_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelRefused):
        Recorder(tmp_path / "file" / "history")


FLOATS = st.floats(allow_nan=False).map(lambda number: number + 0.0)  # no -0.0: it equals 0.0, and need not be kept
LEAVES = st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 64) | FLOATS | st.text(max_size=4)
ENTITIES = st.lists(
    st.fixed_dictionaries({"id": st.integers(0, 5), "size": st.integers(0, 3), "note": LEAVES}), max_size=5
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc+#-"), inner, max_size=3) | ENTITIES
    ),
    max_leaves=12,
)


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@given(VALUES, VALUES)
def test_a_delta_makes_the_new_value_of_the_old_one(old: Any, new: Any) -> None:
    before = exact(old)
    delta = json.loads(json.dumps(leafdelta.between(old, new)))
    assert exact(leafdelta.apply(old, delta)) == exact(new)
    assert exact(old) == before


@given(ENTITIES, ENTITIES)
def test_a_delta_of_entities_makes_the_new_ones_of_the_old_ones(old: Any, new: Any) -> None:
    assert exact(leafdelta.apply(old, leafdelta.between(old, new))) == exact(new)


def test_a_changed_leaf_costs_a_leaf() -> None:
    old = [{"id": f"g{n}", "size": n, "seen": {"rss": 4096 * n}} for n in range(100)]
    new = [dict(item) for item in old[1:]] + [{"id": "new", "size": 1, "seen": {"rss": 0}}]
    new[4]["seen"] = {"rss": 4096 * 7}
    assert leafdelta.between(old, new) == {
        "-": [0],
        "#": {"4": {"seen": {"rss": 2 * 4096}}},
        "+": [{"id": "new", "size": 1, "seen": {"rss": 0}}],
    }
