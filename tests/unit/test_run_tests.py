"""Which tiers run at the same time, and that each is told of."""

from __future__ import annotations

import threading
from typing import IO

import pytest
import run_tests
from run_tests import Tally, run_all


def test_the_host_tier_runs_beside_the_lab_and_what_it_said_comes_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = threading.Barrier(2, timeout=60)

    def timed(tier: str, output: IO[str] | None = None) -> Tally:
        print(f"{tier} runs", file=output)
        if tier in {"host", "vm"}:
            both.wait()
        return Tally(passed=len(tier))

    monkeypatch.setattr(run_tests, "timed", timed)
    assert {tier: tally.passed for tier, tally in run_all(["unit", "host", "vm"]).items()} == {
        "unit": 4,
        "vm": 2,
        "host": 4,
    }
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.endswith("runs")] == ["unit runs", "vm runs", "host runs"]


def test_a_tier_that_was_not_asked_for_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_tests, "timed", lambda tier, output=None: Tally(failed=1, broken=output is not None))
    assert run_all(["host"]) == {"host": Tally(failed=1)}
