"""A file that is replaced is the old one or the new one, whole, to whoever reads it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from memconsole.wholefile import written


def write_half(path: Path) -> None:
    with written(path) as file:
        file.write(b"half")
        raise KeyError


def test_what_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_text("before")
    with pytest.raises(KeyError):
        write_half(path)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="directory"), written(tmp_path) as file:
        file.write(b"whole")
    assert [*tmp_path.parent.glob(f".{tmp_path.name}.*")] == []


def test_it_has_its_mode_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    replace = Path.replace

    def renamed(self: Path, target: Path) -> Path:
        seen.append(stat.S_IMODE(self.stat().st_mode))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renamed)
    before = os.umask(0o027)
    try:
        for mode in (0o600, 0o644, None):
            with written(tmp_path / "file", mode=mode, owner=(os.geteuid(), os.getegid()), lasting=True) as file:
                file.write(b"whole")
    finally:
        os.umask(before)
    assert seen == [0o600, 0o644, 0o640]


def test_what_lies_under_the_drafts_name_is_not_written_through(tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.write_text("theirs")
    (tmp_path / f".note.{os.getpid()}.{threading.get_native_id()}").symlink_to(others)
    with written(tmp_path / "note") as file:
        file.write(b"ours")
    assert (others.read_text(), (tmp_path / "note").read_text()) == ("theirs", "ours")


def test_of_two_writers_each_writes_the_whole(tmp_path: Path) -> None:
    path, between = tmp_path / "file", threading.Event()

    def write() -> None:
        with written(path) as file:
            file.write(b"one")
            file.flush()
            between.wait()

    thread = threading.Thread(target=write)
    thread.start()
    with written(path) as file:
        file.write(b"the other")
    assert path.read_text() == "the other"
    between.set()
    thread.join()
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
