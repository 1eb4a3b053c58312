"""``memconsole serve``: how fast one that died is back with 1,000 regions, and what one costs that nobody asks."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from harness import ROOT, Result, Skip

from memconsole import actions
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody

sys.path.insert(0, str(ROOT / "tests"))

from support.mounted import places
from support.services import Service, services

REGIONS = 1000
ROUNDS = 5
OTHERS = 2000
CALM_S = 5.0
"""Until what a start leaves to be done is done."""
IDLE_S = 35.0
"""How long it is watched: longer than from one survey that nobody asked for to the next."""


def starts(service: Service) -> float:
    """Milliseconds from the start of the process to its first answer, the median of several starts after a kill."""
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        service.start()
        took.append((time.perf_counter() - begin) * 1e3)
        service.end(9)
    return statistics.median(took)


def fill(service: Service) -> None:
    """1,000 regions in the keeper's custody."""
    service.runtime.mkdir(mode=0o755, exist_ok=True)
    with contextlib.closing(Control(service.runtime, KeeperCustody.start(service.runtime))) as control:
        for number in range(REGIONS):
            control.apply(actions.Reserve(f"r{number}", 1 << 20))


def adoption(runtime: Path) -> float:
    """Milliseconds of the adoption alone, in a process that has imported everything."""
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        control = Control(runtime, KeeperCustody(runtime / "keeper"))
        took.append((time.perf_counter() - begin) * 1e3)
        control.close()
    return statistics.median(took)


def bench_start() -> list[Result]:
    with services() as service:
        empty = starts(service)
        fill(service)
        full = starts(service)
        adopted = adoption(service.runtime)
    return [
        Result("start until it answers, no regions", empty, "ms"),
        Result(f"start until it answers, {REGIONS:,} regions in custody", full, "ms", None, 1000),
        Result(f"adoption of {REGIONS:,} regions alone", adopted, "ms"),
    ]


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """So many processes that sleep."""
    words = f"for each in $(seq {count}); do sleep 3600 & done; echo there; wait"
    shell = subprocess.Popen(["sh", "-c", words], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert shell.stdout is not None
        shell.stdout.readline()
        yield
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()


def at_rest(service: Service, asked_s: float | None = None) -> float:
    """Percent of a processor that a service takes which nobody asks, or one that is asked for a Snapshot at times."""
    assert service.process is not None
    clock = ~service.process.pid << 3 | 2  # clock_getcpuclockid
    time.sleep(CALM_S)
    with contextlib.closing(service.client()) as client:
        used, begin = time.clock_gettime(clock), time.monotonic()
        while time.monotonic() < begin + IDLE_S:
            time.sleep(asked_s or IDLE_S)
            if asked_s:
                client.snapshot()
        return (time.clock_gettime(clock) - used) / (time.monotonic() - begin) * 100


def bench_idle() -> list[Result]:
    """What a service takes that nobody asks, alone and beside 2,000 processes that sleep; and one asked each second."""
    beside = f"beside {OTHERS:,} processes"
    with services() as service:
        service.start()
        found = {"nobody asks": at_rest(service), "asked each second": at_rest(service, 1.0)}
        with others(OTHERS):
            found[f"nobody asks, {beside}"] = at_rest(service)
            found[f"asked each second, {beside}"] = at_rest(service, 1.0)
    return [
        Result(f"service, processor time, {what}", part, "%", goal=2.0 if "nobody" in what else None)
        for what, part in found.items()
    ]


def bench_idle_mounted() -> list[Result]:
    """What a service with a mount takes that nobody asks, with a guest that has a grant, beside 2,000 processes."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        raise Skip("needs root, and /dev/fuse")
    with places() as place, others(OTHERS):
        place.grant(place.user())
        part = at_rest(place.service)
    return [
        Result(f"service with a mount, processor time, nobody asks, beside {OTHERS:,} processes", part, "%", goal=2.0)
    ]
