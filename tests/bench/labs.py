"""A bench's run in the lab (tests/support/lab.py); a bench is skipped where there is none."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, Skip

sys.path[:0] = [str(ROOT / "tests")]

from support import lab  # noqa: E402 - found by the line before

RESUME = lab.RESUME


def need() -> None:
    """Skip the bench where there is no lab."""
    if why := lab.lacking():
        raise Skip(why)


def said(
    scenario: str,
    verdict: str,
    *arguments: str,
    memory: str,
    early: str = "",
    append: str = "",
) -> list[dict[str, Any]]:
    """The verdicts of one name of a scenario, in order.

    Raises:
        Skip: there is no lab here. AssertionError: a verdict is bad.
    """
    need()
    with tempfile.TemporaryDirectory(prefix="mc-bench-") as share:
        run = lab.run(
            scenario,
            Path(share),
            memory=memory,
            processors=2,
            packed=True,
            early=early,
            append=append,
            arguments=arguments,
        )
        run.check()
    return [each for each in run.said if each["name"] == verdict]
