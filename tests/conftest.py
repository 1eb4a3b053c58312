"""A tier that cannot run here skips with a reason; ``MEMCONSOLE_REQUIRE=all`` turns such skips into failures."""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator

import pytest
from hypothesis import settings
from xdist.workermanage import NodeManager

# How long an example takes is the machine's affair: a timed assertion is never a test. The same commit is tested the
# same every day, so examples are those of the test; the long forms look for others.
settings.register_profile("untimed", deadline=None, derandomize=not os.environ.get("MEMCONSOLE_SOAK"))
settings.load_profile("untimed")


# A worker writes what it measured as it ends: on a busy machine that takes longer than xdist waits before it kills it.
NodeManager.EXIT_TIMEOUT = 600


LONG_ID = 60
"""Characters that a parameter may have in the name of its test."""
SOAK = "MEMCONSOLE_SOAK=1"
"""What the reason says of a test that runs in ``make soak`` alone, which nobody requires of an ordinary run."""


@pytest.fixture(autouse=True, scope="session")
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """What consoles remember of a test run is no operator's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_make_parametrize_id(val: object) -> str | None:
    """A long text or many bytes are called by their begin, their length and their checksum."""
    if not isinstance(val, str | bytes) or len(val) <= LONG_ID:
        return None
    whole = val if isinstance(val, bytes) else val.encode(errors="surrogatepass")
    return f"{val[:20]!a}...{len(val)}-{zlib.crc32(whole):08x}"


def _required(report: pytest.TestReport | pytest.CollectReport) -> None:
    if os.environ.get("MEMCONSOLE_REQUIRE") == "all" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        if SOAK in str(reason):
            return
        report.outcome = "failed"
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
