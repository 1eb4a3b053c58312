"""What memconsole asks and tells systemd: that an ordinary kexec does not begin, and whose fd stores a jump loses.

A systemctl stands in for systemd's; that systemd itself refuses is tests/vm/test_systemd.py's to see.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from memconsole.backend.custody import manager
from memconsole.backend.custody.manager import DROP_IN, UNIT, KexecGuard, UnitFdStore

SHOWN = """Id=dbus.service
NFileDescriptorStore=0
FileDescriptorStorePreserve=restart

Id=cache.service
NFileDescriptorStore=3
FileDescriptorStorePreserve=yes

Id=memconsole.service
NFileDescriptorStore=12
FileDescriptorStorePreserve=yes

Id=systemd-logind.service
NFileDescriptorStore=2
FileDescriptorStorePreserve=restart

Id=quiet.service
NFileDescriptorStore=1
FileDescriptorStorePreserve=on-success

Id=old.service
NFileDescriptorStore=4
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for systemctl, and the file of what it was asked."""
    log, tool = tmp_path / "told", tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    (tmp_path / "shown").write_text(SHOWN)
    tool.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\n'
        f'case "$*" in *NeedDaemonReload*) cat {tmp_path}/needs ;; *NFile*) cat {tmp_path}/shown ;; esac\n'
    )
    tool.chmod(0o755)
    (tmp_path / "needs").write_text("no\n")
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    return log


def managed(root: Path) -> Path:
    (root / "run/systemd/system").mkdir(parents=True)
    return root / "run/systemd/system" / DROP_IN


def test_a_kexec_is_kept_from_beginning_and_let_begin_again(tmp_path: Path, told: Path) -> None:
    file = managed(tmp_path)
    guard = KexecGuard(str(tmp_path))
    guard.keep(on=True)
    assert f"Requires={UNIT}" in file.read_text().splitlines()
    assert guard.why_not == ""
    asked = told.read_text()
    guard.keep(on=True)
    assert told.read_text() == asked
    guard.keep(on=False)
    assert not file.parent.exists()
    assert "daemon-reload" not in told.read_text()


def test_a_manager_that_knows_the_unit_already_reads_it_again(tmp_path: Path, told: Path) -> None:
    managed(tmp_path)
    (tmp_path / "needs").write_text("yes\n")
    KexecGuard(str(tmp_path)).keep(on=True)
    assert told.read_text().splitlines()[-1] == "daemon-reload"


def test_what_a_control_process_before_left_is_taken_away(tmp_path: Path, told: Path) -> None:
    file = managed(tmp_path)
    KexecGuard(str(tmp_path)).keep(on=True)
    (file.parent / "90-operator.conf").write_text("[Unit]\n")
    KexecGuard(str(tmp_path)).keep(on=False)
    assert [each.name for each in file.parent.iterdir()] == ["90-operator.conf"]
    assert told.exists()


def test_a_kexec_that_cannot_be_kept_from_beginning_is_said(tmp_path: Path, told: Path) -> None:
    file = managed(tmp_path)
    file.parent.write_text("in the way")
    guard = KexecGuard(str(tmp_path))
    guard.keep(on=True)
    assert str(file) in guard.why_not
    file.parent.unlink()
    guard.keep(on=True)
    assert guard.why_not == ""
    assert file.exists()
    assert told.exists()


def test_where_there_is_no_systemd_nothing_is_written(tmp_path: Path, told: Path) -> None:
    guard = KexecGuard(str(tmp_path))
    guard.keep(on=True)
    assert guard.why_not == ""
    assert not (tmp_path / "run").exists()
    assert not told.exists()
    assert not manager.manages(str(tmp_path))


def test_fd_stores_that_are_to_outlive_their_unit_are_named(told: Path) -> None:
    assert manager.stores(but=("memconsole.service",)) == (
        UnitFdStore("cache.service", 3),
        UnitFdStore("quiet.service", 1),
    )
    assert told.exists()


def test_a_systemctl_that_fails_is_not_taken_for_no_fd_stores(told: Path) -> None:
    tool = told.parent / "bin" / "systemctl"
    tool.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        manager.stores()
