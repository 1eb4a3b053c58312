"""What every bench shares: the Result it returns, how to time, and the compiled floors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memconsole.units import parse_size

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"


class Skip(Exception):
    """A bench cannot run here; its text says why."""


@dataclass(frozen=True)
class Result:
    """A figure, the floor measured in the same run, and the goal: for the ratio to the floor, or for the value.

    Without a floor the goal is for the value; with ``absolute`` it is although there is a floor.
    """

    name: str
    value: float
    unit: str
    floor: float | None = None
    goal: float | None = None
    better: Literal["lower", "higher"] = "lower"
    absolute: bool = False

    @property
    def ratio(self) -> float | None:
        return self.value / self.floor if self.floor else None

    @property
    def met(self) -> bool:
        if self.goal is None:
            return True
        measured = self.value if self.ratio is None or self.absolute else self.ratio
        return measured <= self.goal if self.better == "lower" else measured >= self.goal


def span(default: str) -> int:
    """How many bytes of memory a bench may use: MEMCONSOLE_BENCH_SIZE where it is smaller than what the bench wants."""
    return min(parse_size(default), parse_size(os.environ.get("MEMCONSOLE_BENCH_SIZE", default)))


def timed(function: Callable[[], object]) -> int:
    """Nanoseconds one call takes; what it returns is closed if it can be."""
    begin = time.perf_counter_ns()
    made = function()
    took = time.perf_counter_ns() - begin
    if hasattr(made, "close"):
        made.close()
    return took


def best(function: Callable[[], object], rounds: int = 5) -> int:
    """The fewest nanoseconds of several calls."""
    return min(timed(function) for _ in range(rounds))


def _compiled(name: str, *flags: str) -> str:
    BUILD.mkdir(exist_ok=True)
    strict = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    source = Path(__file__).parent / "floor.c"
    subprocess.run(["cc", *strict, *flags, "-o", BUILD / name, source], check=True)
    return str(BUILD / name)


def floors() -> ctypes.CDLL:
    """floor.c as a library: ``floor_pagemap(fd, start, bytes)`` and ``floor_read(bytes, threads)`` in ns."""
    library = ctypes.CDLL(_compiled("floor.so", "-shared", "-fPIC"))
    library.floor_pagemap.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
    library.floor_read.argtypes = [ctypes.c_uint64, ctypes.c_uint]
    library.floor_pagemap.restype = library.floor_read.restype = ctypes.c_uint64
    return library


@contextlib.contextmanager
def holder(size: int, stride: int = 1) -> Iterator[tuple[int, int]]:
    """A process that has ``size`` bytes of a memfd in 4 KiB pages mapped and touched: its pid, and the address.

    A ``stride`` above 1 scatters the frames: pages that follow each other were not touched one after the other.
    """
    command = [_compiled("floor"), "hold", str(size), str(stride)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()
