"""``memconsole snapshot`` from its first instruction to its last, against the imports any such program pays for.

Floor and measurement take turns, and both find their bytecode compiled, as an installed package's is. The goal is the
time of ``python -c 'import msgspec, psutil'`` twice, plus the survey, which reads /proc and /sys and is timed warm, so
it is taken off what a lone snapshot needs. With a control process the survey is made there; nothing is taken off. What
is used is paid for by who asks: ``--usage`` imports psutil and reads more, and its row says how much that is.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench_wire import SERVICE, running
from harness import Result

from memconsole.backend.embedded import embedded

ROUNDS = 15
FLOOR = (sys.executable, "-c", "import msgspec, psutil")


def process(command: tuple[str, ...], bytecode: str) -> Callable[[], object]:
    """Runs a command to its end with its bytecode kept in a directory."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = bytecode
    return lambda: subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def in_turns(*calls: Callable[[], object]) -> list[float]:
    """The median milliseconds of each, called one after the other ROUNDS times; a first turn does not count."""
    took: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS + 1):
        for call, list_ in zip(calls, took, strict=True):
            begin = time.perf_counter_ns()
            call()
            list_.append((time.perf_counter_ns() - begin) / 1e6)
    return [median(list_[1:]) for list_ in took]


def bench_snapshot() -> list[Result]:
    with tempfile.TemporaryDirectory() as bytecode, running(SERVICE) as path:
        command = (str(Path(sys.executable).with_name("memconsole")), "--socket")
        with contextlib.closing(embedded(read_only="a bench")) as control:
            floor, lone, used, served, survey = in_turns(
                process(FLOOR, bytecode),
                process((*command, str(path.with_name("nobody")), "snapshot"), bytecode),
                process((*command, str(path.with_name("nobody")), "snapshot", "--usage"), bytecode),
                process((*command, str(path), "snapshot"), bytecode),
                control.snapshot,
            )
    return [
        Result("survey of this host", survey, "ms"),
        Result("memconsole snapshot, survey and all", lone, "ms", floor),
        Result("memconsole snapshot, less the survey", lone - survey, "ms", floor, 2),
        Result("memconsole snapshot --usage, against one without", used, "ms", lone),
        Result("memconsole snapshot of a control process", served, "ms", floor, 2),
    ]
