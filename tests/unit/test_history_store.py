"""The history: what was recorded is read back, bounded, and never believed behind damage."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import synthetic
from support.waiting import LONG_S

from memconsole.backend.diagnose.inspect import describe
from memconsole.backend.history import former, json_delta, store, writer
from memconsole.backend.history.store import History
from memconsole.backend.history.writer import Recorder
from memconsole.errors import BadFile, KernelRefused, NotFound, Refused
from memconsole.model import Event, Region, Snapshot

SECOND = 10**9


def with_resident(region: Region, resident: int) -> Region:
    assert region.seen is not None
    return msgspec.structs.replace(region, seen=msgspec.structs.replace(region.seen, resident=resident))


def moment(n: int) -> Snapshot:
    """A host as it changes: a guest's progress, a resident size, an event, a region that comes and goes."""
    base = synthetic.snapshot(6 if n % 10 < 5 else 5, 2, events=3, beats=1000 + 13 * n)
    regions = tuple(with_resident(region, n * 4096 * (at + 1)) for at, region in enumerate(base.regions))
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


def size(directory: Path) -> int:
    """Bytes of the store's files, without SQLite's index, which is memory."""
    return sum(path.stat().st_size for path in directory.iterdir() if not path.name.endswith("-shm"))


def damaged(recorder: Recorder) -> list[str]:
    assert all(finding.id == "history-damaged" for finding in recorder.findings())
    return [finding.subject for finding in recorder.findings()]


@pytest.fixture(autouse=True)
def small_chapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FRAMES_A_CHAPTER", 8)


def test_every_snapshot_is_read_back_at_its_time(tmp_path: Path) -> None:
    snapshots = recorded(tmp_path, 30)
    found = History(tmp_path)
    assert found.times() == [snapshot.taken_ns for snapshot in snapshots]
    assert found.times(27 * SECOND) == [28 * SECOND, 29 * SECOND, 30 * SECOND]
    for snapshot in (*snapshots, *reversed(snapshots), *snapshots[::7]):
        assert found.at(snapshot.taken_ns) == snapshot
        assert found.at(snapshot.taken_ns + SECOND - 1) == snapshot
    assert found.at(1 << 62) == snapshots[-1]
    with pytest.raises(NotFound):
        found.at(SECOND - 1)
    assert describe(found.path).facts["snapshots"] == 30
    found.close()


def test_several_look_while_one_records(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    lookers = [History(tmp_path) for _ in range(3)]
    for n in range(12):
        recorder.record(moment(n))
        for looker in lookers[: n % 3 + 1]:
            assert looker.at(1 << 62) == moment(n)
            assert len(looker.times()) == n + 1
    recorder.close()
    for looker in lookers:
        assert looker.at(5 * SECOND) == moment(4)
        looker.close()


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no snapshot"):
        History(tmp_path / "nothing").at(1)
    assert History(tmp_path / "nothing").times() == []


def test_snapshots_of_an_older_version_are_read_between_those_of_this_one(tmp_path: Path) -> None:
    finding = msgspec.defstruct("Finding", [("id", str), ("severity", str), ("subject", str), ("what", str)])
    recorder = Recorder(tmp_path)
    for n in range(6):
        old = tuple(finding("region-lost", "error", f"r{k}", f"{n} of it") for k in range(2))
        recorder.record(msgspec.structs.replace(moment(n), version=1, findings=old) if n < 3 else moment(n))
    recorder.close()
    found = History(tmp_path)
    for n in range(6):
        shown = found.at((n + 1) * SECOND)
        if n < 3:
            assert [each.observed for each in shown.findings] == [f"{n} of it"] * 2
            assert msgspec.structs.replace(shown, findings=moment(n).findings) == moment(n)
        else:
            assert shown == moment(n)


def test_a_clock_that_goes_back_does_not_reorder(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for n in (5, 3, 3, 9):
        recorder.record(moment(n))
    recorder.close()
    found = History(tmp_path)
    assert found.times() == [6 * SECOND, 6 * SECOND + 1, 6 * SECOND + 2, 10 * SECOND]
    assert [found.at(at).taken_ns for at in found.times()] == [6 * SECOND, 4 * SECOND, 4 * SECOND, 10 * SECOND]


def test_it_is_bounded_by_bytes(tmp_path: Path) -> None:
    limit = 160_000
    recorder = Recorder(tmp_path, max_bytes=limit)
    for n in range(300):
        recorder.record(moment(n))
        assert size(tmp_path) <= limit
    recorder.close()
    found = History(tmp_path)
    assert found.times()[-1] == 300 * SECOND
    assert 20 < len(found.times()) < 300
    assert found.at(found.times()[0]).taken_ns == found.times()[0]
    assert describe(found.path).findings == ()


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
    recorder = Recorder(tmp_path / "made")
    recorder.record(moment(0))
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    assert len(list((tmp_path / "made").iterdir())) == 4
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "made").iterdir())
    recorder.close()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made").chmod(mode)
    with pytest.raises(Refused) as caught:
        Recorder(tmp_path / "made")
    assert caught.value.code == "NotPrivate"
    assert list((tmp_path / "made").iterdir()) == []


def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "made").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused):
        Recorder(tmp_path / "made")
    assert list((tmp_path / "elsewhere").iterdir()) == []


KILLED = """
import sys
sys.path[:0] = {paths!r}
import test_history_store as here
from pathlib import Path
here.writer.FRAMES_A_CHAPTER = 8
recorder = here.Recorder(Path({directory!r}))
n = 0
while True:
    recorder.record(here.moment(n))
    print(n, flush=True)
    n += 1
"""


@pytest.mark.parametrize("after", [1, 9, 23])
def test_a_recorder_that_is_killed_loses_nothing(tmp_path: Path, after: int) -> None:
    tests = Path(__file__).parents[1]
    code = KILLED.format(paths=[str(tests), str(tests / "unit")], directory=str(tmp_path / "made"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(after):
            last = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait(LONG_S)
    found = History(tmp_path / "made")
    times = found.times()
    assert times[: last + 1] == [(n + 1) * SECOND for n in range(last + 1)]
    assert [found.at(time) for time in times] == [moment(n) for n in range(len(times))]
    found.close()
    recorder = Recorder(tmp_path / "made")
    assert damaged(recorder) == []
    recorder.record(moment(len(times) + 5))
    recorder.close()
    assert describe(found.path).findings == ()


def copied(directory: Path, place: Path) -> Path:
    """What a host that lost its power would find: the file and its log as they are now."""
    place.mkdir(mode=0o700)
    for name in (store.FILE, f"{store.FILE}-wal"):
        shutil.copy(directory / name, place / name)
    return place


def test_a_log_cut_at_any_byte_costs_only_what_is_behind(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "made")
    for n in range(11):
        recorder.record(moment(n))
    log = (tmp_path / "made" / f"{store.FILE}-wal").read_bytes()
    assert len(log) > 10_000
    before = 11
    for cut in range(len(log), 0, -997):
        place = copied(tmp_path / "made", tmp_path / f"cut-{cut}")
        os.truncate(place / f"{store.FILE}-wal", cut)
        with contextlib.closing(Recorder(place)) as again:
            assert damaged(again) == []
            times = (found := History(place)).times()
            assert len(times) <= before
            assert [found.at(time) for time in times] == [moment(n) for n in range(len(times))]
            again.record(moment(50))
            assert found.at(1 << 62) == moment(50)
            found.close()
        before = len(times)
        shutil.rmtree(place)
    recorder.close()


def test_a_bit_that_flips_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    snapshots = {snapshot.taken_ns: snapshot for snapshot in recorded(tmp_path, 3)}
    path = tmp_path / store.FILE
    whole = path.read_bytes()
    believed = 0
    for byte in range(0, len(whole), 61):
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << byte % 8
        path.write_bytes(flipped)
        found = History(tmp_path)
        try:
            for key in found.times():
                assert found.at(key) == snapshots[key]
                believed += 1
        except (BadFile, NotFound):
            pass
        found.close()
    assert believed > 0


@pytest.mark.parametrize("offset", [0, 16, 40, 100, 4096])
def test_a_damaged_file_is_set_aside_named_and_recording_goes_on(tmp_path: Path, offset: int) -> None:
    recorded(tmp_path, 11)
    with (tmp_path / store.FILE).open("r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 64)
    content = (tmp_path / store.FILE).read_bytes()
    recorder = Recorder(tmp_path)
    recorder.record(moment(50))
    recorder.record(moment(51))
    found = History(tmp_path)
    assert found.at(1 << 62) == moment(51)
    if offset != 4096:  # what is behind the first page is found when it is read
        assert damaged(recorder) in (["damaged.sqlite"], ["other-version.sqlite"])
        assert (tmp_path / damaged(recorder)[0]).read_bytes() == content
        assert len(found.times()) == 2
    found.close()
    recorder.close()


def test_damage_while_it_records_is_set_aside_too(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for n in range(3):
        recorder.record(moment(n))
    assert recorder._database is not None
    recorder._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    page = (tmp_path / store.FILE).stat().st_size // 4096
    with (tmp_path / store.FILE).open("r+b") as file:
        for at in range(1, page):
            file.seek(at * 4096)
            file.write(b"\xff" * 512)
    recorder._database.execute("PRAGMA cache_size = 0")
    recorder._database.execute("PRAGMA shrink_memory")
    recorder._last = 0  # as after a restart: the place of the next frame is looked up
    recorder.close()
    recorder = Recorder(tmp_path)
    recorder.record(moment(7))
    assert damaged(recorder) == ["damaged.sqlite"]
    assert History(tmp_path).times() == [8 * SECOND]
    assert describe(tmp_path / "damaged.sqlite").findings
    (tmp_path / "damaged.sqlite").unlink()
    assert damaged(recorder) == []
    recorder.close()


def test_a_file_that_is_removed_is_made_anew(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    found = History(tmp_path)
    recorder.record(moment(0))
    assert len(found.times()) == 1
    for path in tmp_path.glob(f"{store.FILE}*"):
        path.unlink()
    assert found.times() == []
    recorder.record(moment(1))
    assert found.at(1 << 62) == moment(1)
    found.close()
    recorder.close()


def newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 9")


def foreign(path: Path) -> None:
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE frames (a)")


@pytest.mark.parametrize("change", [newer, foreign])
def test_a_file_of_another_version_or_program_is_kept_as_it_is_and_named(tmp_path: Path, change: Any) -> None:
    recorded(tmp_path, 2)
    change(tmp_path / store.FILE)
    content = (tmp_path / store.FILE).read_bytes()
    with pytest.raises(BadFile):
        History(tmp_path).times()
    recorder = Recorder(tmp_path)
    assert damaged(recorder) == ["other-version.sqlite"]
    recorder.record(moment(5))
    assert (tmp_path / "other-version.sqlite").read_bytes() == content
    assert History(tmp_path).times() == [6 * SECOND]
    recorder.close()
    with pytest.raises(BadFile):
        describe(tmp_path / "other-version.sqlite")


def test_a_frame_that_inflates_without_end_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, 3)
    monkeypatch.setattr(store, "LARGEST_FRAME", 1 << 20)
    payload = store.Chapter(SECOND).packed(SECOND, b'"' + b"a" * (2 << 20) + b'"')
    with contextlib.closing(sqlite3.connect(tmp_path / store.FILE)) as database:
        database.execute("UPDATE frames SET payload = ? WHERE key = ?", (payload, SECOND))
        database.commit()
    with pytest.raises(BadFile, match="the frame of 1000000000"):
        History(tmp_path).at(SECOND)
    found = describe(tmp_path / store.FILE)
    assert found.facts["snapshots"] == 0
    assert "inflates to more than" in found.findings[0].observed


def test_frames_that_change_places_are_not_believed(tmp_path: Path) -> None:
    recorded(tmp_path, 4)
    with contextlib.closing(sqlite3.connect(tmp_path / store.FILE)) as database:
        database.execute("UPDATE frames SET key = key + 1 WHERE key = ?", (3 * SECOND,))
        database.commit()
    found = History(tmp_path)
    assert found.at(2 * SECOND) == moment(1)
    for time in (3 * SECOND + 1, 4 * SECOND):
        with pytest.raises(BadFile, match="the frame of 3000000001"):
            found.at(time)
    with contextlib.closing(sqlite3.connect(tmp_path / store.FILE)) as database:
        database.execute("DELETE FROM frames WHERE key = ?", (SECOND,))
        database.commit()
    with pytest.raises(BadFile):
        found.at(2 * SECOND)
    found.close()


def test_a_full_disk_is_said_and_nothing_half_is_left(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.record(moment(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in tmp_path.iterdir() if not path.name.endswith("-shm"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest + 10, hard))
    try:
        for n in (1, 2):
            with pytest.raises(KernelRefused, match="the history in"):
                recorder.record(moment(n))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    recorder.record(moment(3))
    recorder.close()
    found = History(tmp_path)
    assert damaged(recorder) == []
    assert [found.at(key) for key in found.times()] == [moment(0), moment(3)]


def test_a_directory_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelRefused):
        Recorder(tmp_path / "file" / "history")


# --- what a memconsole before this one wrote ---------------------------------------------------------------------


def former_file(directory: Path, snapshots: list[Snapshot], *, version: int = 1) -> Path:
    """A file of format 1, as its writer wrote it."""
    directory.mkdir(mode=0o700, exist_ok=True)
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    out = [struct.pack("<8sII", b"MCHISTRY", version, 0)]
    before: Any = None
    for snapshot in snapshots:
        value = store.encode(snapshot)
        text = msgspec.json.encode(json_delta.between(before, value) if before is not None else value)
        before = value
        piece = packer.compress(text) + packer.flush(zlib.Z_SYNC_FLUSH)
        head = struct.pack("<QIII", snapshot.taken_ns, len(piece), zlib.crc32(piece), 0)
        out += [head, struct.pack("<I", zlib.crc32(head)), piece]
    path = directory / f"{snapshots[0].taken_ns:020d}.history"
    path.write_bytes(b"".join(out))
    return path


def test_former_files_are_taken_over_one_a_snapshot_and_then_gone(tmp_path: Path) -> None:
    old = [moment(n) for n in range(20)]
    for at in (0, 8, 16):
        former_file(tmp_path, old[at : at + 8])
    recorder = Recorder(tmp_path)
    for n in range(30, 34):
        recorder.record(moment(n))
    recorder.close()
    found = History(tmp_path)
    assert not list(tmp_path.glob("*.history"))
    assert [found.at(time) for time in found.times()] == [*old, *(moment(n) for n in range(30, 34))]
    assert damaged(recorder) == []
    found.close()


def test_a_former_file_is_taken_over_up_to_where_it_is_torn(tmp_path: Path) -> None:
    path = former_file(tmp_path, [moment(n) for n in range(5)])
    os.truncate(path, path.stat().st_size - 1)
    assert describe(path).facts["snapshots"] == 4
    recorder = Recorder(tmp_path)
    recorder.record(moment(9))
    recorder.close()
    assert History(tmp_path).times() == [*((n + 1) * SECOND for n in range(4)), 10 * SECOND]
    assert not path.exists()


def test_a_former_file_that_is_unknown_is_kept_and_named(tmp_path: Path) -> None:
    path = former_file(tmp_path, [moment(0)], version=9)
    recorder = Recorder(tmp_path)
    for n in range(3):
        recorder.record(moment(n + 4))
    assert damaged(recorder) == [path.name]
    recorder.close()
    assert path.exists()
    with pytest.raises(BadFile, match="version 9"):
        describe(path)


def test_former_files_count_for_the_bounds(tmp_path: Path) -> None:
    for at in range(0, 64, 8):
        former_file(tmp_path, [moment(n) for n in range(at, at + 8)])
    limit = size(tmp_path) // 2 + 100_000
    recorder = Recorder(tmp_path, max_bytes=limit)
    for n in range(100, 120):
        recorder.record(moment(n))
    recorder.close()
    assert size(tmp_path) <= limit
    assert not list(tmp_path.glob(f"*{former.SUFFIX}"))
