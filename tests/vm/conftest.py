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

BUDGET_S = 260
"""Seconds a sample may take, so that all tiers end within 25 minutes on two cores."""
SECONDS = {
    "audit": 260,
    "dma": 200,
    "dma-amd": 200,
    "dma-qemu": 170,
    "dma-type1": 150,
    "handoff-custody": 400,
    "handoff-devices": 220,
    "handoff-devices-refused": 110,
    "handoff-faults": 150,
    "handoff-mount": 200,
    "handoff-passthrough": 160,
    "handoff-qemu": 90,
    "handoff-refused": 140,
    "landing-faults": 170,
    "luo-frozen": 60,
    "resume-a": 45,
    "resume-broken": 40,
    "resume-go": 105,
    "resume-guest": 45,
    "resume-spoiled": 45,
    "revoke-rwp": 75,
    "systemd": 600,
    "systemd-fdstore": 600,
}
"""What each group takes there, alone."""
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
