"""Every group of this tier runs every time, in its short form; ``MEMCONSOLE_SOAK=1``, ``make soak``, has long forms.

A test marked ``group(name)`` shares a run of the lab with its group; what is not marked is of the group of its file.
Groups are what runs at the same time, where labs do (tools/run_tests.py); those that take longest begin first.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest
from support import lab

SECONDS = {
    "adopted": 1,
    "arena": 125,
    "arena-cut": 1,
    "arena-devdax": 155,
    "audit": 125,
    "dma": 65,
    "dma-amd": 50,
    "dma-qemu": 55,
    "dma-type1": 45,
    "handoff": 180,
    "handoff-custody": 200,
    "handoff-devices": 110,
    "handoff-devices-refused": 45,
    "handoff-faults": 100,
    "handoff-mount": 220,
    "handoff-services": 120,
    "handoff-passthrough": 100,
    "handoff-qemu": 110,
    "handoff-refused": 150,
    "lab": 25,
    "landing-faults": 57,
    "luo": 27,
    "luo-frozen": 20,
    "readers": 30,
    "resume-a": 20,
    "resume-broken": 20,
    "resume-go": 40,
    "resume-guest": 20,
    "resume-spoiled": 20,
    "revoke-rwp": 60,
    "systemd": 100,
    "systemd-fdstore": 130,
    "systemd-newest": 200,
}
"""Seconds of a processor that the short form of each group takes, about."""
REPEATED = "the lab ran again"


def group_of(item: pytest.Item) -> str:
    """The group of a test."""
    marker = item.get_closest_marker("group")
    return str(marker.args[0]) if marker else item.path.stem.removeprefix("test_").replace("_", "-")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "group(name): shares a run of the lab with its group")
    config.addinivalue_line("markers", "xdist_group(name): runs in one process with its group")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (-SECONDS[group_of(item)], group_of(item)))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the emulation made the lab do again is told, in whichever process that was."""
    report = yield
    report.user_properties.extend((REPEATED, why) for why in lab.repeated)
    lab.repeated.clear()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [each for found in terminalreporter.stats.values() for each in found]
    told = {why for each in reports for name, why in getattr(each, "user_properties", ()) if name == REPEATED}
    for why in sorted(told):
        terminalreporter.write_line(f"{REPEATED}: {why}")
