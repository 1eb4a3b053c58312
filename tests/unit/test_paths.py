"""Which socket is asked: one's own first, then the host's where that is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from memconsole import paths


@pytest.mark.parametrize(
    ("own", "host", "asked"), [(True, True, "own"), (False, True, "host"), (True, False, "own"), (False, False, "own")]
)
def test_an_operator_without_root_reaches_the_hosts_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool, host: bool, asked: str
) -> None:
    monkeypatch.setattr(paths, "HOST", tmp_path / "host")
    monkeypatch.setattr(paths, "runtime_dir", lambda: tmp_path / "own")
    for name, there in (("own", own), ("host", host)):
        (tmp_path / name).mkdir()
        if there:
            (tmp_path / name / "control").touch()
    assert paths.nearest_socket() == tmp_path / asked / "control"
