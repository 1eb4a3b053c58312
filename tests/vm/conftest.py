"""A fixed part of this tier runs every time, and a rotating sample of the rest; ``MEMCONSOLE_SOAK=1`` runs all of it.

A test marked ``rotating(group)`` shares a run of the lab with its group. ``MEMCONSOLE_ROTATION`` (else the day of the
year) says with which group the sample begins; those that follow are taken while there is time. The groups that are left
out are named; what takes longer than a sample may is left to a soak.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import pytest

BUDGET_S = 150
"""Seconds a sample may take, so that all tiers end within 25 minutes on two cores."""
SECONDS = {
    "audit": 200,
    "dma": 140,
    "dma-amd": 150,
    "dma-qemu": 120,
    "dma-type1": 120,
    "handoff-custody": 240,
    "handoff-devices": 240,
    "handoff-devices-refused": 75,
    "handoff-faults": 120,
    "handoff-mount": 170,
    "handoff-passthrough": 130,
    "handoff-qemu": 90,
    "handoff-refused": 140,
    "landing-faults": 85,
    "luo-frozen": 50,
    "resume-a": 35,
    "resume-broken": 30,
    "resume-go": 50,
    "resume-guest": 30,
    "resume-spoiled": 30,
    "revoke-rwp": 100,
    "systemd": 400,
    "systemd-fdstore": 400,
}
"""What each group takes there, alone, with some to spare."""
_left_out: list[str] = []


def sample(groups: Sequence[str], turn: int) -> set[str]:
    """The groups of a turn: every one that fits is the first of some turn."""
    fitting = [group for group in groups if SECONDS[group] <= BUDGET_S]
    start, left = turn % len(fitting), BUDGET_S
    chosen = set()
    for group in fitting[start:] + fitting[:start]:
        if SECONDS[group] <= left:
            chosen.add(group)
            left -= SECONDS[group]
    return chosen


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rotating(group): runs in turns with the other groups, or in a soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("MEMCONSOLE_SOAK"):
        return
    group_of = {item: marker.args[0] for item in items if (marker := item.get_closest_marker("rotating"))}
    groups = sorted(set(group_of.values()))
    if len(groups) < len(SECONDS):  # some were asked for by name
        return
    chosen = sample(groups, int(os.environ.get("MEMCONSOLE_ROTATION") or time.gmtime().tm_yday))
    _left_out[:] = [group for group in groups if group not in chosen]
    gone = [item for item, group in group_of.items() if group not in chosen]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in set(gone)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        groups = ", ".join(_left_out)
        terminalreporter.write_line(f"left to other runs: {groups} (MEMCONSOLE_SOAK=1 runs all)")
