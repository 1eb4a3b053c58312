"""Directories of a service: none below which somebody else could put another in their place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memconsole import paths
from memconsole.backend.exports import mountpoint
from memconsole.errors import Refused

OTHER = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make directories of other users")


def refused(path: Path) -> Refused:
    with pytest.raises(Refused) as error:
        paths.make_directory(path, 0o700)
    assert error.value.code == "NotPrivate"
    assert error.value.remedy
    assert not path.exists()
    return error.value


def test_what_is_missing_is_made(tmp_path: Path) -> None:
    paths.make_directory(tmp_path / "a/b/c", 0o700)
    assert (tmp_path / "a/b/c").stat().st_mode & 0o777 == 0o700
    paths.make_directory(tmp_path / "a/b/c", 0o700)


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o703])
def test_a_directory_that_everybody_may_write_to_is_named(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    said = refused(tmp_path / "open/deeper/state")
    assert str(tmp_path / "open") in said.why
    (tmp_path / "open").chmod(0o1777)
    paths.make_directory(tmp_path / "open/deeper/state", 0o700)


@needs_root
def test_a_directory_of_somebody_else_is_named_wherever_it_stands(tmp_path: Path) -> None:
    theirs = tmp_path / "home"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    assert f"{theirs} belongs to user {OTHER}" in refused(theirs / "state").why
    assert f"{theirs} belongs to user {OTHER}" in refused(theirs / "a/b").why
    with pytest.raises(Refused, match="belongs to user"):
        mountpoint.refuse_mountpoint(theirs / "mnt", runtime=tmp_path / "run", state_dir=tmp_path / "state")
    (tmp_path / "link").symlink_to(theirs)
    assert str(theirs) in refused(tmp_path / "link/state").why
    (tmp_path / "mine").mkdir()
    (tmp_path / "by").symlink_to(tmp_path / "mine")
    paths.make_directory(tmp_path / "by/state", 0o700)
    os.chown(tmp_path / "by", OTHER, OTHER, follow_symlinks=False)
    assert str(tmp_path / "by") in refused(tmp_path / "by/other").why


@needs_root
def test_a_group_may_write_where_it_is_ones_own(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o775)
    os.chown(shared, 0, OTHER)
    assert f"group {OTHER}" in refused(shared / "state").why
    os.chown(shared, 0, os.getegid())
    paths.make_directory(shared / "state", 0o700)
