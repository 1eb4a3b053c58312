"""Write constraints.txt anew: the version of everything that is installed to build, run and test memconsole.

Usage: lock.py (``make lock``)

Resolves what pyproject.toml wants in an environment of its own, with no constraint, and writes down what came: one
``name==version`` a line, in order, names as PyPI normalises them. Take the oldest Python that memconsole runs on.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PIN = re.compile(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)")


def wanted() -> list[str]:
    """Every requirement of pyproject.toml: to build, to run, to test; and pip itself."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    to_test = project["project"]["optional-dependencies"]["test"]
    return ["pip", *project["build-system"]["requires"], *project["project"]["dependencies"], *to_test]


def pins(frozen: str) -> list[str]:
    """The lines of constraints.txt, from those of ``pip freeze --all``.

    Raises:
        ValueError: a line is no name and version.
    """
    found = []
    for line in frozen.split("\n"):
        match = PIN.fullmatch(line.strip())
        if match:
            found.append(f"{re.sub(r'[-_.]+', '-', match[1]).lower()}=={match[2]}")
        elif line.strip():
            raise ValueError(f"{line!r} is no name and version")
    return sorted(found, key=lambda pin: pin.split("=="))


def main() -> None:
    """Resolve, and write."""
    with tempfile.TemporaryDirectory(prefix="mc-lock-") as name:
        venv.create(name, with_pip=True)
        pip = [f"{name}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", *wanted()], check=True)
        frozen = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    found = pins(frozen)
    CONSTRAINTS.write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
    print(f"{CONSTRAINTS}: {len(found)} packages")


if __name__ == "__main__":
    main()
