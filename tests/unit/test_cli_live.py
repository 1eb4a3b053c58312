"""What changes, told as it changes; and a region's contents in a file of its own."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from support.served import ServedSource
from support.synthetic import NOW_NS, snapshot
from support.waiting import until

from memconsole.backend.diagnose import arenas
from memconsole.backend.wire.serving import serve_in_thread
from memconsole.cli import main
from memconsole.errors import ExitCode, NotFound
from memconsole.model import Event, Finding, Guest, GuestState, Severity

M = 1 << 20


class WithMemory(ServedSource):
    """A source whose regions have these contents, a segment each."""

    def __init__(self, *segments: bytes) -> None:
        super().__init__(snapshot())
        self.segments = segments

    def open_readonly(self, region: str, *, peer: str = "") -> tuple[int, ...]:
        if region not in {each.name for each in self._snapshot.regions}:
            raise NotFound(f"there is no region {region}", "none has this name", "memconsole regions lists them")
        fds = []
        for contents in self.segments:
            fd = os.memfd_create("segment")
            os.ftruncate(fd, len(contents))
            for at in range(0, len(contents), 4096):
                if any(part := contents[at : at + 4096]):
                    os.pwrite(fd, part, at)
            fds.append(fd)
        return tuple(fds)


@pytest.fixture
def memory() -> WithMemory:
    first = bytearray(6 * M)
    first[M : M + 5] = b"hello"
    first[5 * M : 5 * M + 8192] = os.urandom(8192)
    return WithMemory(bytes(first), b"\0" * M, b"x" * M)


@pytest.fixture
def served(memory: WithMemory, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "control"
    handle = serve_in_thread(memory, path)
    yield path
    handle.close()


def test_a_region_is_copied_whole_with_its_holes(
    memory: WithMemory, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, to = memory.snapshot().regions[0].name, tmp_path / "copy"
    assert main(["--socket", str(served), "copy", name, str(to), "--json"]) == ExitCode.DONE
    said = json.loads(capsys.readouterr().out)
    assert (said["size"], said["copied"]) == (8 * M, 4096 + 8192 + M)
    assert to.read_bytes() == b"".join(memory.segments)
    assert to.stat().st_blocks * 512 < 3 * M
    assert to.stat().st_mode & 0o777 == 0o600


def test_no_file_is_written_over_and_none_is_left_of_what_cannot_be_copied(
    memory: WithMemory, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, there = memory.snapshot().regions[0].name, tmp_path / "there"
    there.write_text("mine")
    assert main(["--socket", str(served), "copy", name, str(there)]) == ExitCode.REFUSED
    assert "there is a file of this name" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert main(["--socket", str(served), "copy", "nowhere", str(tmp_path / "copy")]) == ExitCode.FAILED
    assert "there is no region nowhere" in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_what_changes_is_told_once_and_what_always_runs_on_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, path = ServedSource(snapshot()), tmp_path / "control"
    handle, ended, said = serve_in_thread(source, path), [], []
    words = ["--socket", str(path), "watch", "--every", "0.25", "--json"]
    watcher = threading.Thread(target=lambda: ended.append(main(words)))
    watcher.start()

    def told() -> list[dict[str, list[dict[str, object]]]]:
        said.append(capsys.readouterr().out)
        return [json.loads(line) for line in "".join(said).splitlines() if line.startswith('{"taken_ns"')]

    try:
        until(lambda: source.surveys > 2, "it is watched")
        old = source.snapshot()
        changed = [_beaten(each) for each in old.guests]
        changed[0] = msgspec.structs.replace(changed[0], state=GuestState.PAUSED)
        event = Event(old.events[-1].seq + 1, NOW_NS, "paused", changed[0].name, "it was paused", "uid 0")
        source.show(msgspec.structs.replace(old, guests=tuple(changed), events=(*old.events, event)))
        until(lambda: bool(told()), "the change is told")
    finally:
        handle.close()
        watcher.join()
    assert ended == [ExitCode.REFUSED], "the service has ended"
    lines = told()
    assert [each["text"] for line in lines for each in line["events"]] == ["it was paused"]
    found = [(each["key"], each["field"]) for line in lines for each in line["changes"]]
    assert (changed[0].name, "state") in found
    assert len(found) == len(set(found))


def _beaten(guest: Guest) -> Guest:
    """The guest a beat later."""
    if guest.progress is None:
        return guest
    return msgspec.structs.replace(
        guest, progress=msgspec.structs.replace(guest.progress, beats=guest.progress.beats + 1)
    )


def test_a_table_that_is_none_is_named(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", str(served), "watch", "--tables", "guests,birds"]) == ExitCode.USAGE
    assert "there is no table 'birds'" in capsys.readouterr().err


def test_arenas_that_are_not_there_are_told_as_the_service_knows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Finding(
        "arena-missing", Severity.ERROR, "lab", "arena lab is not there", "/proc/cmdline", "boot it again"
    )
    other = Finding("region-lost", Severity.ERROR, "web", "it is lost", "custody", "none")
    monkeypatch.setattr(arenas, "ranges", lambda **_: ())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    path = tmp_path / "served"
    handle = serve_in_thread(ServedSource(msgspec.structs.replace(snapshot(), findings=(missing, other))), path)
    try:
        assert main(["--socket", str(path), "arena", "list"]) == ExitCode.DONE
        assert capsys.readouterr().out == "arena lab is not there: boot it again\n"
    finally:
        handle.close()
