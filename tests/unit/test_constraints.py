"""What pip installs is pinned, by name and version and nothing else, down to what only builds."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from lock import pins, wanted
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = dict(line.split("==") for line in LINES)
HERE: dict[str, str] = {canonicalize_name(each.name): each.version for each in metadata.distributions()}


def needed() -> set[str]:
    """What pyproject.toml wants, and all that wants in turn, as far as it is installed here."""
    found: set[str] = set()
    left = [Requirement(line) for line in wanted()]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        asked = [{"extra": extra} for extra in (one.extras or {""})]
        if name in found and not one.extras:
            continue
        found.add(name)
        for line in (metadata.requires(name) or ()) if name in HERE else ():
            more = Requirement(line)
            if more.marker is None or any(more.marker.evaluate(extra) for extra in asked):
                left.append(more)
    return found


def test_every_line_is_a_name_and_a_version_and_they_are_in_order() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.!+]*", line) for line in LINES), LINES
    assert list(PINNED) == sorted(PINNED)
    assert len(PINNED) == len(LINES)


def test_everything_that_is_installed_for_memconsole_is_pinned_and_of_that_version() -> None:
    wanted_here = needed()
    assert wanted_here <= set(PINNED), "`make lock` pins anew"
    here = {name: HERE[name] for name in wanted_here & set(HERE)}
    pinned = {name: PINNED[name] for name in here}
    assert here == pinned, "`make clean` and `make test` install what is pinned"


def test_the_pins_are_within_what_the_project_says_it_works_with() -> None:
    for line in wanted():
        found = Requirement(line)
        assert found.specifier.contains(PINNED[canonicalize_name(found.name)]), line


def test_every_installation_of_the_makefile_is_held_to_them() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "INSTALL := install --quiet --constraint constraints.txt --build-constraint constraints.txt\n" in text
    lines = [line for line in text.splitlines() if line.startswith("\t") and "$(PIP)" in line]
    assert lines
    assert all("$(INSTALL)" in line or "--constraint constraints.txt" in line for line in lines), lines
    elsewhere = [path for name in (".ci", "tools", "docs") for path in (ROOT / name).rglob("*") if path.is_file()]
    written = [path for path in elsewhere if path.suffix != ".pyc"]  # Python may have left them there
    texts = {path: path.read_text(encoding="utf-8") for path in [*written, ROOT / "README.md"]}
    assert not [str(path) for path, said in texts.items() if re.search(r"\bpip3? install\b", said)]


def test_what_is_no_plain_version_is_not_written_down() -> None:
    assert pins("Jinja2==3.1.6\nast_serialize==0.13.1\n\n") == ["ast-serialize==0.13.1", "jinja2==3.1.6"]
    for line in ("-e /src/x", "x @ file:///tmp/x", "# Editable install (x==1)", "x>=1"):
        with pytest.raises(ValueError, match="no name and version"):
            pins(line)
