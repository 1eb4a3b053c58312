"""What guests use, as this host's kernel counts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.controls import controls, guest
from support.waiting import until

from memconsole import actions as do
from memconsole import rates
from memconsole.backend.control import Control
from memconsole.model import Part, Snapshot, Usage

PARTS = (Part.USAGE, Part.PLACEMENT)
M = 1 << 20

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="reads other processes' I/O: root")


@pytest.fixture
def control() -> Iterator[Control]:
    with controls() as made:
        yield made


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process of one thread that never waits, in 64 MiB that it has touched."""
    loop = f"import sys; kept = bytearray(b'x' * ({64 * M})); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) as made:
        assert made.stdout is not None
        made.stdout.readline()
        yield made
        made.kill()


def usage(shown: Snapshot, name: str) -> Usage:
    found = rates.usage_of(guest(shown, name))
    assert found is not None
    return found


def test_a_busy_process_uses_about_one_cpu_of_those_it_may_run_on(
    control: Control, busy: subprocess.Popen[bytes]
) -> None:
    os.sched_setaffinity(busy.pid, {0})
    control.apply(do.GuestAttach("loop", busy.pid))
    first = control.snapshot(PARTS)
    began = usage(first, "loop").cpu_ns or 0

    def grown() -> bool:
        return (usage(control.snapshot(PARTS), "loop").cpu_ns or 0) > began + 500_000_000

    until(grown, "half a second of CPU time")
    shown = rates.rated(first, control.snapshot(PARTS))
    found = usage(shown, "loop")
    assert found.rates is not None
    assert found.rates.busy is not None
    # One thread: never more than a CPU, but for the step of the counter; less where others want it.
    assert 0 < found.rates.busy <= 1 + 20_000_000 / found.rates.over_ns
    assert (found.threads, found.cpus) == (1, "0")
    assert found.read is not None
    assert found.age_ns is not None
    assert found.unknown == ""
    assert shown.usage is not None
    assert shown.usage.rates is not None
    assert shown.usage.rates.busy is not None
    assert shown.usage.rates.busy > 0


def test_where_the_memory_of_a_guest_lies_adds_up(control: Control, busy: subprocess.Popen[bytes]) -> None:
    control.apply(do.GuestAttach("loop", busy.pid))
    until(lambda: usage(control.snapshot(PARTS), "loop").memory is not None, "a look at its memory")
    placed = usage(control.snapshot(PARTS), "loop").memory
    assert placed is not None
    assert sum(each.size for each in placed) >= 64 * M
    assert {each.node for each in placed} <= {node.number for node in control.snapshot().memory.nodes}


def test_a_snapshot_that_nobody_asked_more_of_has_no_usage(control: Control) -> None:
    shown = control.snapshot()
    assert shown.usage is None
    assert all(rates.usage_of(each) is None for each in shown.guests)
