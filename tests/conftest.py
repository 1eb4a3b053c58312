"""A tier that cannot run here skips with a reason; ``MEMCONSOLE_REQUIRE=all`` turns such skips into failures."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# How long an example takes is the machine's affair: a timed assertion is never a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _required(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("MEMCONSOLE_REQUIRE") == "all" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"required by MEMCONSOLE_REQUIRE=all, but: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _required(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _required(report)
    return report
