"""Run test tiers under measurement and print what share of each room's lines ran.

Usage: measure_coverage.py [all | unit]

``unit`` measures the unit tier alone; ``all`` the native, tui, fleet and host tiers too. The lab is not measured: what
runs in a guest leaves nothing here. A room is a package below memconsole, or a module that stands in none or in FLOORS.
A room whose share of the unit tier is below its floor is an error. The data stay in build/coverage-unit and
build/coverage-all, for ``coverage html --data-file=...``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
COVERAGE = (sys.executable, "-m", "coverage")
BESIDES = ("native", "tui", "fleet", "host")
BACKEND = "memconsole/backend"
FLOORS = {
    f"{BACKEND}/{room}": 85
    for room in ("verbs", "revoke", "handoff", "adoption.py", "wire", "ledger", "steps.py", "work.py")
}
"""The percent of a room's lines that the unit tier runs at least: what needs neither root nor a live kernel."""


def measure(name: str, *tiers: str) -> tuple[Path, bool]:
    """Run ``tiers``; the file of what they ran, and whether their tests passed."""
    data = BUILD / f"coverage-{name}"
    BUILD.mkdir(exist_ok=True)
    for left in (data, *BUILD.glob(f"{data.name}.*")):
        left.unlink(missing_ok=True)
    command = [*COVERAGE, "run", "tools/run_tests.py", *tiers]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"COVERAGE_FILE": str(data)}, check=False)
    combine(data, *BUILD.glob(f"{data.name}.*"))
    return data, ended.returncode == 0


def combine(into: Path, *found: Path) -> None:
    """Make ``into`` what all of ``found`` ran together; files that other sums are made of are kept."""
    subprocess.run(
        [*COVERAGE, "combine", "--keep", "--quiet", f"--data-file={into}", *map(str, found)], cwd=ROOT, check=True
    )


def lines_of(data: Path) -> tuple[Counter[str], Counter[str]]:
    """How many lines each room has, and how many of them ran."""
    said = subprocess.run(
        [*COVERAGE, "json", "--quiet", f"--data-file={data}", "-o", "-"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return by_room(json.loads(said.stdout)["files"])


def by_room(files: Mapping[str, Mapping[str, Mapping[str, int]]]) -> tuple[Counter[str], Counter[str]]:
    """The lines of each room and those that ran, from the ``files`` of coverage's JSON."""
    whole: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for path, found in files.items():
        summary = found["summary"]
        for name in (room(path), "all rooms"):
            whole[name] += summary["num_statements"]
            ran[name] += summary["covered_lines"]
    return whole, ran


def room(path: str) -> str:
    """The package of a module, ``memconsole/backend/kernel``; a module of memconsole itself is a room of its own."""
    parent = str(PurePosixPath(path).parent)
    return path if parent == "memconsole" or path in FLOORS else parent


def fallen(measured: tuple[Counter[str], Counter[str]]) -> list[str]:
    """The rooms whose share of a measurement is below their floor, in words."""
    whole, ran = measured
    shares = {name: 100 * ran[name] / whole[name] for name in FLOORS if whole[name]}
    return [
        f"the unit tier runs {share:.1f}% of {name}, and {FLOORS[name]}% is the floor: test what was added"
        for name, share in shares.items()
        if share < FLOORS[name]
    ]


def table(columns: Mapping[str, tuple[Counter[str], Counter[str]]]) -> str:
    """Rooms down, measurements across, in percent; the sum of all rooms last."""
    whole = next(iter(columns.values()))[0]
    rows = [f"{'room':44}{'lines':>8}" + "".join(f"{name:>8}" for name in columns)]
    for name in [*sorted(set(whole) - {"all rooms"}), "all rooms"]:
        if whole[name]:
            shares = "".join(f"{100 * ran[name] / total[name]:7.1f}%" for total, ran in columns.values())
            rows.append(f"{name:44}{whole[name]:8}{shares}")
    return "\n".join(rows)


def main() -> int:
    """Measure what was asked for; 0 when the tests passed and no room is below its floor."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    if wanted not in {"all", "unit"}:
        print(f"coverage is measured over 'unit' or 'all', not over {wanted!r}", file=sys.stderr)
        return 2
    unit, passed = measure("unit", "unit")
    columns = {"unit": lines_of(unit)}
    if wanted == "all":
        besides, also = measure("besides", *BESIDES)
        passed = passed and also
        combine(BUILD / "coverage-all", unit, besides)
        columns["all"] = lines_of(BUILD / "coverage-all")
    print(f"\n{table(columns)}")
    below = fallen(columns["unit"])
    for line in below:
        print(line, file=sys.stderr)
    return 0 if passed and not below else 1


if __name__ == "__main__":
    sys.exit(main())
