"""Commits to the ledger against what a durable record costs elsewhere; the size of a recorded day."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from harness import BUILD, ROOT, Result

from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.history.store import History
from memconsole.backend.history.writer import Recorder
from memconsole.backend.ledger.log import Ledger, RecordKind
from memconsole.model import Snapshot

sys.path.insert(0, str(ROOT / "tests"))
from support import keepers, synthetic

RECORD = msgspec.json.encode(
    {"at_ns": 1_790_000_000_000_000_000, "do": "map", "region": "web0-ram0", "guest": "web0", "gpa": 1 << 20, "uid": 0}
)


def median(function: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The median and the 99th percentile of a call's time in us."""
    took = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        function()
        took.append(time.perf_counter_ns() - begin)
    took.sort()
    return took[rounds // 2] / 1e3, took[rounds * 99 // 100] / 1e3


def bench_append() -> list[Result]:
    """A commit of a typical record, against append and fdatasync of the same bytes to a file in build/."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=BUILD) as file:

        def durable() -> None:
            os.write(file.fileno(), RECORD)
            os.fdatasync(file.fileno())

        floor, _ = median(durable, 500)
    log = Ledger.create("bench")
    p50, p99 = median(lambda: log.append(RecordKind.INTENT, RECORD), 50_000)
    begin = time.perf_counter_ns()
    again = Ledger.open(os.dup(log.fd))
    replayed = (time.perf_counter_ns() - begin) / 1e6
    again.close()
    log.close()
    return [
        Result(f"ledger commit of {len(RECORD)} bytes, p50, against fdatasync", p50, "us", floor, 0.1),
        Result("ledger commit, p99", p99, "us", None, 50),
        Result("ledger opened and checked, 50,000 records", replayed, "ms"),
    ]


def bench_custody() -> list[Result]:
    """An fd into the keeper, out of it, and dropped: three requests."""
    from memconsole import native

    with keepers.running(native.program("memconsole-keeper")) as run:
        custody = KeeperCustody(run.path)
        fd = os.memfd_create("bench", os.MFD_CLOEXEC)

        def turn() -> None:
            custody.put("a", fd, RECORD)
            os.close(custody.get("a")[0])
            custody.drop("a")

        p50, p99 = median(turn, 3000)
        os.close(fd)
        custody.close()
    return [
        Result("custody: put, get and drop with the keeper, p50", p50, "us"),
        Result("custody: put, get and drop with the keeper, p99", p99, "us"),
    ]


def busy_host(count: int) -> Iterator[Snapshot]:
    """A host of 100 regions and 30 guests, second by second.

    Every second all guests' progress and resident size, free memory and the uptime change, and three regions in ten
    grow; every minute there is an event.
    """
    rng = random.Random(3)
    replace = msgspec.structs.replace
    shown = synthetic.snapshot(100, 30, windows=24, domains=12, events=200, findings=4)
    for n in range(count):
        memory = replace(shown.memory, free=shown.memory.free + 4096 * rng.randrange(-2000, 2000))
        regions = [
            replace(r, seen=replace(r.seen, resident=r.seen.resident + 4096 * rng.randrange(500)))
            if r.seen and rng.random() < 0.3
            else r
            for r in shown.regions
        ]
        guests = []
        for guest in shown.guests:
            seen = guest.seen and replace(guest.seen, rss=guest.seen.rss + 4096 * rng.randrange(-50, 50))
            said = guest.progress
            said = said and replace(said, beats=said.beats + rng.randrange(900, 1100), checked=said.checked + n * 4099)
            guests.append(replace(guest, seen=seen, progress=said))
        events = shown.events
        if n % 60 == 59:
            events = (*events[1:], replace(events[-1], seq=events[-1].seq + 1, at_ns=shown.taken_ns))
        shown = replace(
            shown,
            taken_ns=shown.taken_ns + 10**9 + rng.randrange(10**6),
            host=replace(shown.host, uptime_s=shown.host.uptime_s + 1 + rng.random() / 1000),
            memory=memory,
            regions=tuple(regions),
            guests=tuple(guests),
            events=events,
        )
        yield shown


def bench_history() -> list[Result]:
    """A day at one snapshot a second, from 20 minutes of it (chapters are of five minutes, so it scales)."""
    seconds = 1200
    snapshots = list(busy_host(seconds))
    with tempfile.TemporaryDirectory() as directory:
        recorder = Recorder(Path(directory))
        begin = time.perf_counter_ns()
        for shown in snapshots:
            recorder.record(shown)
        took = (time.perf_counter_ns() - begin) / 1e6 / seconds
        recorder.close()
        history = History(Path(directory))
        day = history.path.stat().st_size / seconds * 86_400 / (1 << 20)
        begin = time.perf_counter_ns()
        history.at(snapshots[299].taken_ns)
        worst = (time.perf_counter_ns() - begin) / 1e6
    whole = len(msgspec.json.encode(snapshots[0])) * 86_400 / (1 << 20)
    return [
        Result("a recorded day, 100 regions, one a second", day, "MiB", None, 100),
        Result("a recorded day, against whole JSON", day, "MiB", whole, 0.02),
        Result("record one snapshot of 100 regions", took, "ms"),
        Result("show the snapshot farthest from a whole one", worst, "ms"),
    ]
