"""A fixed part of this tier runs every time, and a rotating sample of the rest; ``MEMCONSOLE_SOAK=1`` runs all of it.

A test marked ``rotating(group)`` shares a run of the lab with its group. ``MEMCONSOLE_ROTATION`` (else the day of the
year) says where the sample begins; the groups that are left out are named.
"""

from __future__ import annotations

import os
import time

import pytest

SAMPLE = 2
_left_out: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rotating(group): runs in turns with the other groups, or in a soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("MEMCONSOLE_SOAK"):
        return
    group_of = {item: marker.args[0] for item in items if (marker := item.get_closest_marker("rotating"))}
    groups = sorted(set(group_of.values()))
    if len(groups) <= SAMPLE:
        return
    turn = int(os.environ.get("MEMCONSOLE_ROTATION") or time.gmtime().tm_yday) * SAMPLE
    chosen = {groups[(turn + number) % len(groups)] for number in range(SAMPLE)}
    _left_out[:] = [group for group in groups if group not in chosen]
    gone = [item for item, group in group_of.items() if group not in chosen]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in set(gone)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        groups = ", ".join(_left_out)
        terminalreporter.write_line(f"left to other runs: {groups} (MEMCONSOLE_SOAK=1 runs all)")
