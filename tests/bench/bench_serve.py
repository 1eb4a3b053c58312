"""How fast a control process that died is back: ``memconsole serve`` with 1,000 regions, until it answers."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from pathlib import Path

from harness import ROOT, Result

from memconsole import actions
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody

sys.path.insert(0, str(ROOT / "tests"))

from support.services import Service, services

REGIONS = 1000
ROUNDS = 5


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
