"""Maps, forks and revokes in a storm of processes: no page is ever reached by two owners."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.controls import controls
from support.open_fds import nothing_stays_open
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.control import Control
from memconsole.extents import ExtentTable
from memconsole.model import RevokeOutcome, Rung

PAGE = 4096
PAGES = 32
SIZE = PAGES * PAGE
SECONDS = 60.0 if os.environ.get("MEMCONSOLE_SOAK") else 5.0
CROWD = 50
REGIONS = 8
MAGIC = 0x53544F5200000000
TREE = Path(__file__).parents[2]
ROW = struct.Struct("<6Q")


class Row(NamedTuple):
    """What one process of the storm (tests/host/storm.c) and its children did and saw."""

    grants: int
    looks: int
    foreign: int
    faults: int
    forks: int
    seen: int


@contextlib.contextmanager
def crowd(directory: Path, agents: Path) -> Iterator[tuple[list[int], mmap.mmap]]:
    """The processes' PIDs, and their board."""
    program, board = directory / "storm", directory / "board"
    strict = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(TREE / "memconsole/native")]
    subprocess.run(["cc", *strict, "-o", program, TREE / "tests/host/storm.c"], check=True)
    board.write_bytes(bytes(CROWD * ROW.size))
    with board.open("r+b") as file, mmap.mmap(file.fileno(), 0) as rows:
        processes = [subprocess.Popen([program, agents, board, str(number)]) for number in range(CROWD)]
        try:
            yield [process.pid for process in processes], rows
        finally:
            for process in processes:
                process.kill()
                process.wait()


def rows(board: mmap.mmap) -> list[Row]:
    return [Row(*ROW.unpack_from(board, number * ROW.size)) for number in range(CROWD)]


class Owner(threading.Thread):
    """Gives one region to a process at random, takes it back and looks whether it is as that process left it."""

    def __init__(self, control: Control, region: str, ends: float) -> None:
        super().__init__(name=region)
        self.control = control
        self.region = region
        self.ends = ends
        self.turns: Counter[tuple[Rung, RevokeOutcome]] = Counter()
        self.wrong: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self.ends and not self.wrong:
                self.turn(random.randrange(CROWD))
        except BaseException as error:  # noqa: BLE001 - the test tells of it
            self.error = error

    def turn(self, number: int) -> None:
        grant = self.control.apply(do.Map(self.region, f"p{number}")).subject
        report = self.control.apply(do.Revoke(grant, within=0.05, at_most=Rung.COPY)).revoke
        assert report is not None
        self.turns[report.rung, report.outcome] += 1
        with self.control._acting:
            (fd,) = self.control._desk.fds(self.region)
            held = os.pread(fd, SIZE, 0)
        words = {struct.unpack_from("<Q", held, at)[0] for at in range(0, SIZE, PAGE)}
        if words != {MAGIC | number}:
            self.wrong.append(f"{grant}: {[hex(word) for word in words]} where p{number} was")


def shared_frames(control: Control) -> set[int]:
    """Frames that are in two regions at once; nobody maps, revokes or moves anything meanwhile."""
    counted: Counter[int] = Counter()
    with control._acting:
        for number in range(REGIONS):
            (fd,) = control._desk.fds(f"r{number}")
            with ExtentTable.scan_fd(fd, SIZE) as table:
                counted.update(row.pfn + page for row in table for page in range(row.count))
    return {pfn for pfn, times in counted.items() if pfn and times > 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="frames and other users' processes are for root")
def test_no_page_is_reached_by_two_owners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every process keeps all it ever had, as far as it can, in itself and its children, and keeps looking."""
    with (
        nothing_stays_open(),
        controls() as control,
        crowd(tmp_path, control.runtime_dir / "agents") as (pids, board),
    ):
        for number in range(REGIONS):
            control.apply(do.Reserve(f"r{number}", SIZE))
        for number, pid in enumerate(pids):
            control.apply(do.GuestAttach(f"p{number}", pid))
        for number in range(CROWD):
            until(lambda number=number: control._desk.hub.connected(f"p{number}"), "its agent is there")  # type: ignore[misc]
        began = time.monotonic()
        owners = [Owner(control, f"r{number}", began + SECONDS) for number in range(REGIONS)]
        for owner in owners:
            owner.start()
        while any(owner.is_alive() for owner in owners):
            assert shared_frames(control) == set()
            time.sleep(0.5)
        took = time.monotonic() - began
        for owner in owners:
            owner.join()
            if owner.error is not None:
                raise owner.error
            assert owner.wrong == []
        until(lambda: control.snapshot().quarantine == (), "what was seen on its way is free")
        found = rows(board)
        total = Row(*(sum(column) for column in zip(*found, strict=True)))
        turns = sum((owner.turns for owner in owners), Counter[tuple[Rung, RevokeOutcome]]())
        assert [(number, hex(row.seen)) for number, row in enumerate(found) if row.foreign] == []
        assert total.grants >= sum(turns.values()) >= REGIONS
        assert min(total.looks, total.faults, total.forks) > 0
        assert {rung for rung, _ in turns} <= {Rung.ASK, Rung.COPY}
    with capsys.disabled():
        ends = ", ".join(f"{count} {outcome} after {rung}" for (rung, outcome), count in sorted(turns.items()))
        print(f"\nstorm: {took:.0f} s, {CROWD} processes, {total.forks} forks, {ends}; {total.looks} looks, "
              f"{total.faults} faults, {total.foreign} foreign")  # fmt: skip
