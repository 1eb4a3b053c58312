"""The pictures of the documents: each is shown somewhere, and stale when what determines it is another."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tour_pictures

ROOT = Path(__file__).parents[2]


def test_every_picture_is_there_and_every_one_is_shown() -> None:
    shown = {
        str((page.parent / name).resolve().relative_to(ROOT))
        for page in (ROOT / "README.md", ROOT / "docs" / "tour.md")
        for name in re.findall(r"\]\(([^)]*\.svg)\)", page.read_text())
    }
    made = {*tour_pictures.PICTURES, tour_pictures.HOSTS}
    assert shown == made
    assert all((ROOT / name).read_text().startswith("<svg") for name in made)


def test_pictures_are_stale_when_what_determines_them_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made-of.json"
    monkeypatch.setattr(tour_pictures, "MADE_OF", made)
    here = tour_pictures.digests()
    assert "memconsole/views/app.py" in here
    made.write_text(json.dumps(here))
    assert tour_pictures.check() == 0
    made.write_text(json.dumps({**here, "memconsole/views/app.py": "0"}))
    assert tour_pictures.check() == 1
    assert "memconsole/views/app.py is another" in capsys.readouterr().out
