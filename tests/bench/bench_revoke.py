"""A revoke with the contents kept, against the bare calls that do its work."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from harness import Result, span
from labs import said
from memory_floors import memory_floors

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.backend.embedded import embedded
from memconsole.backend.ledger.state import Recorded
from memconsole.backend.revoke import move
from memconsole.units import format_size

ROUNDS = 3


@contextlib.contextmanager
def granted(size: int) -> Iterator[tuple[Control, int]]:
    """A control process, and a canary with all of a full region mapped; its pid."""
    with tempfile.TemporaryDirectory(prefix="mc-") as directory:
        control = embedded(Path(directory) / "run")
        try:
            control.apply(do.Reserve("big", size, prefault=True))
            control.apply(do.GuestStart("c1", memory=4 << 20))
            control.apply(do.Map("big", "c1", gpa=1 << 32))
            yield control, next(guest.pid or 0 for guest in control.snapshot().guests if guest.name == "c1")
        finally:
            control.close()


def bench_copy_out() -> list[Result]:
    """The copy rung of 1 GiB, whole and its parts, against memcpy into fresh memory, and that with ftruncate."""
    size = span("1G")
    bare = memory_floors()
    whole, copies, memcpys, emptied = [], [], [], []
    for _ in range(ROUNDS):
        floor = (bare.floor_memcpy(size, os.cpu_count() or 1), bare.floor_empty(size))
        memcpys.append(floor[0])
        emptied.append(sum(floor))
        with granted(size) as (control, pid):
            took: list[int] = []
            with _timed(took):
                os.kill(pid, signal.SIGSTOP)
                report = control.apply(do.Revoke("g2", within=0.2)).revoke
                os.kill(pid, signal.SIGCONT)
            assert report is not None
            assert report.rung == "copy", report
            whole.append(took[1])
            copies.append(took[0])
    name = format_size(size)
    return [
        Result(
            f"contents of {name} moved to fresh frames, against memcpy",
            min(copies) / 1e6,
            "ms",
            min(memcpys) / 1e6,
            1.3,
        ),
        Result(f"copy rung of {name}, against memcpy + ftruncate", min(whole) / 1e6, "ms", min(emptied) / 1e6, 1.3),
    ]


def bench_protect() -> list[Result]:
    """The protect rung of 1 GiB in the lab, against UFFDIO_RWPROTECT of the range; that against no guest's."""
    rows = []
    for each in said("protect_cost", "protect", "1024", str(ROUNDS), memory="4G"):
        # Of 2 MiB pages a gigabyte is 512 entries: what is measured there is what does not grow with the range.
        call, goal = min(each["call_ns"]) / 1e6, 1.3 if each["page"] == "4K" else None
        name = f"protect of 1G, {each['page']} pages"
        rows += [
            Result(f"{name}, against UFFDIO_RWPROTECT of it", min(each["bar_ns"]) / 1e6, "ms", call, goal),
            Result(f"{name}, with the proof that no process reaches it", min(each["rung_ns"]) / 1e6, "ms", call),
            Result(
                f"UFFDIO_RWPROTECT of it, {each['page']} pages, against no guest's",
                call,
                "ms",
                min(each["own_ns"]) / 1e6,
            ),
        ]
    return rows


@contextlib.contextmanager
def _timed(took: list[int]) -> Iterator[None]:
    """Time of the copy itself, then of the whole move, into ``took``."""
    copy, whole = move._copy, move.move_segment

    def timed_copy(*arguments: Any, **options: Any) -> None:
        began = time.perf_counter_ns()
        copy(*arguments, **options)
        took.append(time.perf_counter_ns() - began)

    def timed_move(*arguments: Any) -> Recorded[move.MoveResult]:
        began = time.perf_counter_ns()
        end = yield from whole(*arguments)
        took.append(time.perf_counter_ns() - began)
        return end

    with mock.patch.multiple(move, _copy=timed_copy, move_segment=timed_move):
        yield
