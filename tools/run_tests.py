"""Run the test tiers and say of each how it went, what was skipped, and why.

Usage: run_tests.py [all | TIER ...], where a TIER is one of lint, unit, native, tui, fleet, host, vm
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TIERS = ("lint", "unit", "native", "tui", "fleet", "host", "vm")
LINT = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    ("lint-imports",),
    ("pytest", "-q", "-p", "no:xdist", "tests/lint"),
)
NO_TESTS_COLLECTED = 5
LABS = min(os.cpu_count() or 1, 4)
"""Labs at the same time: each is one busy thread; when it waits, the host tier has the processor."""
ROOMY = 2 << 30
"""Bytes: several times what the unit tier writes."""
SPREAD = ("-n", "2", "--dist", "worksteal")
"""Tests that share nothing but the processors: a worker that has none left takes some of the other's."""
SOME_WAITING = ("-n", "3", "--dist", "worksteal")
"""Likewise, where some wait: a third of the unit tier's time passes until something is late, or gone."""
FILES = ("-n", "2", "--dist", "loadfile")
"""Likewise, where the tests of a file share what is built for them."""
WAITING = ("-n", "4", "--dist", "worksteal")
"""Likewise, of which half the time is waiting: Textual's Pilot takes 40 ms to see that a key has been done."""
OPTIONS = {
    "unit": SOME_WAITING,
    "native": FILES,
    "tui": WAITING,
    "fleet": SPREAD,
    "vm": ("-n", str(LABS), "--dist", "loadgroup", "--no-loadscope-reorder", "--durations=0", "--durations-min=20"),
}
"""What a tier is run with besides. The lab's groups begin in an order of their own (tests/vm/conftest.py); what each
took is printed, for that order.
"""


@dataclass
class Tally:
    """How a tier went; ``skips`` maps a reason to how many tests gave it, ``failures`` a test to why."""

    passed: int = 0
    failed: int = 0
    skips: dict[str, int] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    broken: bool = False

    @property
    def text(self) -> str:
        """One line of the summary."""
        skipped = sum((self.skips or {}).values())
        verdict = "FAILED" if self.failed or self.broken else "ok"
        return f"{verdict:7}{self.passed:6} passed {self.failed:4} failed {skipped:4} skipped {self.seconds:8.1f} s"


def lint() -> Tally:
    """Formatter, linter, types, contracts and tests of the sources, side by side; what each said, one by one."""
    tally = Tally(skips={})
    with ThreadPoolExecutor(len(LINT)) as pool:
        done = list(pool.map(_linted, LINT))
    for command, ended in zip(LINT, done, strict=True):
        print(f"--- {' '.join(command)}\n{ended.stdout}", end="", flush=True)
        tally.passed += ended.returncode == 0
        tally.failed += ended.returncode != 0
        if ended.returncode != 0:
            tally.failures[command[0]] = f"exit status {ended.returncode}"
    return tally


def _linted(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    words = [str(BIN / command[0]), *command[1:]]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


@contextlib.contextmanager
def scratch(tier: str) -> Iterator[tuple[str, ...]]:
    """Where the tests of a tier write: for the unit tier memory, if there is enough, which is less work than a disk."""
    memory = Path("/dev/shm")  # noqa: S108 - a directory of our own in it
    if tier == "unit" and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ROOMY:
        with tempfile.TemporaryDirectory(prefix="memconsole-tests-", dir=memory) as own:
            yield (f"--basetemp={own}/tests",)
    else:
        yield ()


def run_tier(tier: str, output: IO[str] | None = None) -> Tally:
    """One tier through pytest, which writes to ``output``; its counts come from the JUnit file pytest writes."""
    report = ROOT / "build" / f"tests-{tier}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    with scratch(tier) as place:
        options = [*OPTIONS.get(tier, ()), *place, f"--junit-xml={report}"]
        command = [sys.executable, "-m", "pytest", "-q", *options, f"tests/{tier}"]
        ended = subprocess.run(command, cwd=ROOT, stdout=output, check=False)
    tally = Tally(skips={}, broken=ended.returncode not in {0, 1, NO_TESTS_COLLECTED} or not report.exists())
    if tally.broken:
        return tally
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own file
        skipped = case.find("skipped")
        if skipped is not None and skipped.get("type") != "pytest.xfail":
            reason = re.sub(r"\s+", " ", skipped.get("message") or "no reason given")
            tally.skips = tally.skips or {}
            tally.skips[reason] = tally.skips.get(reason, 0) + 1
        elif (failure := case.find("failure")) is not None or (failure := case.find("error")) is not None:
            tally.failed += 1
            said = (failure.get("message") or "no reason given").splitlines()[0]
            tally.failures[f"{case.get('classname')}::{case.get('name')}"] = said
        else:
            tally.passed += 1
    return tally


def timed(tier: str, output: IO[str] | None = None) -> Tally:
    """One tier, and how long it took."""
    began = time.monotonic()
    tally = lint() if tier == "lint" else run_tier(tier, output)
    tally.seconds = time.monotonic() - began
    return tally


def beside_the_lab() -> dict[str, Tally]:
    """The host tier and the lab at the same time.

    Tests of the first share this host, and run one after the other; the lab's share nothing with them but processors,
    which they leave idle now and then.
    """
    with tempfile.TemporaryFile("w+") as output, ThreadPoolExecutor(1) as pool:
        print("=== vm, and host beside it", flush=True)
        host = pool.submit(timed, "host", output)
        tallies = {"vm": timed("vm"), "host": host.result()}
        print("=== host", flush=True)
        output.seek(0)
        shutil.copyfileobj(output, sys.stdout)
    return tallies


def run_all(tiers: Collection[str]) -> dict[str, Tally]:
    """Every tier that has tests."""
    together = {"host", "vm"} if {"host", "vm"} <= set(tiers) else set()
    tallies: dict[str, Tally] = {}
    for tier in tiers:
        if tier in together or (tier != "lint" and not any((ROOT / "tests" / tier).rglob("test_*.py"))):
            continue
        print(f"=== {tier}", flush=True)
        tallies[tier] = timed(tier)
    return tallies | (beside_the_lab() if together else {})


def main() -> int:
    """Run what was asked for; 0 when nothing failed."""
    wanted = sys.argv[1:] or ["all"]
    if unknown := [name for name in wanted if name not in {"all", *TIERS}]:
        print(f"there is no tier {unknown[0]!r}; one of: all, {', '.join(TIERS)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("not root: the host tier will skip what the kernel does not let an ordinary user do", flush=True)
    tallies = run_all(TIERS if "all" in wanted else wanted)
    print("\n=== summary")
    for tier, tally in tallies.items():
        print(f"{tier:8}{tally.text}")
        for reason, count in sorted((tally.skips or {}).items()):
            print(f"        skipped {count}: {reason}")
        for test, why in tally.failures.items():
            print(f"        failed {test}: {why}")
    passed = sum(tally.passed for tally in tallies.values())
    failed = sum(tally.failed + tally.broken for tally in tallies.values())
    skipped = sum(sum((tally.skips or {}).values()) for tally in tallies.values())
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
