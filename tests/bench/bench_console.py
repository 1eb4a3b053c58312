"""From a key to a painted frame: the console in a real terminal over 10,000 regions, 1,000 guests, 1,000,000 extents.

How it is measured: the console runs in a process of its own on a pseudo-terminal of 132x50. The terminal (this
process) says that it knows synchronized output, so that the console ends every frame with ``ESC [ ? 2 0 2 6 l``. The
clock starts before a key's bytes are written to the terminal and stops when the end of the first frame that follows has
been read: it holds parsing the key, the action, the compositor, the driver, the pty. A *painted frame* is everything
between two such ends: the console holds a key's frame until its widgets have answered each other, so that the first
frame is what the key leads to, echo, table, title and keys; *settled* is the end of the last frame, when none follows
for 60 ms; where it is later than the first, something came after. *Processor time* is what the console's process used
until the frame's end had been read, all threads together: it says the same on a machine where others work. Meanwhile
a Snapshot in which some regions and guests differ comes every second. The floor is the same for a Textual app with one
line that a key changes. Memory is VmHWM, the most that was ever resident. Escape is not among the keys: no program can
tell it from the begin of an arrow key without waiting for what follows (25 ms here; ESCDELAY).

``python tests/bench/bench_console.py`` prints median and maximum of every key.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness import Result

HERE = Path(__file__).parent
COLUMNS, ROWS = 132, 50
FRAME_END = b"\x1b[?2026l"
SETTLED = 0.06
PATIENCE = 5.0
IDLE = 10.0
KEYS = {
    "down": "\x1b[B", "up": "\x1b[A", "right": "\x1b[C", "left": "\x1b[D", "pgdn": "\x1b[6~", "pgup": "\x1b[5~",
    "home": "\x1b[H", "end": "\x1b[F", "enter": "\r", "ctrl+u": "\x15",
}  # fmt: skip

TABLE_KEYS = (
    ["2"] + ["down"] * 60 + ["pgdn"] * 20 + ["up"] * 20 + ["pgup"] * 5 + ["end", "home"] * 5 + [">", "i"] * 6
    + ["/", *"web12", "ctrl+u", "enter"] * 3
    + ["3"] + ["down"] * 30 + ["pgdn"] * 10 + [">", "i"] * 4 + ["/", *"cache", "ctrl+u", "enter"] * 2
    + ["2", "3"] * 10 + list("1234678") * 3
)  # fmt: skip
MAP_KEYS = (
    ["down"] * 15 + ["right"] * 30 + ["+"] * 3 + ["down"] * 60 + ["right"] * 20 + ["pgdn"] * 20 + ["pgup"] * 10
    + ["e"] * 10 + ["E"] * 5 + ["."] * 10 + [","] * 10 + ["-", "+"] * 10 + ["z"] * 6 + ["F"] * 6
    + ["end", "home"] * 6
)  # fmt: skip


# --- the process that is measured -----------------------------------------------------------------------------------


def _console(table: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    from msgspec.structs import replace
    from support.alternating import AlternatingSource
    from support.synthetic import NOW_NS, big_snapshot

    from memconsole.extents import ExtentTable
    from memconsole.views.app import ConsoleApp

    class BigSource(AlternatingSource):
        """Has the table ready in a file, as a control process would have it in a memfd."""

        def extents(self, key: str, at_ns: int | None = None) -> ExtentTable:
            with Path(table).open("rb") as file:
                return ExtentTable.from_fd(file.fileno())

    now = big_snapshot()
    source = BigSource(now)
    regions = [
        replace(region, node=1 - (region.node or 0)) if number % 1000 == 7 else region
        for number, region in enumerate(now.regions)
    ]
    guests = [
        replace(guest, memory=guest.memory + 4096) if number % 100 == 7 else guest
        for number, guest in enumerate(now.guests)
    ]
    source.other = replace(now, regions=tuple(regions), guests=tuple(guests))
    ConsoleApp(source, interval=1.0, clock=lambda: NOW_NS).run()


def _empty() -> None:
    from textual.app import App, ComposeResult
    from textual.events import Key
    from textual.widgets import Static

    class Empty(App[None]):
        count = 0

        def compose(self) -> ComposeResult:
            yield Static("0")

        def on_key(self, event: Key) -> None:
            self.count += 1
            self.query_one(Static).update(str(self.count % 10), layout=False)

    Empty().run()


# --- the terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """The other end of a pty with a console on it."""

    def __init__(self, *arguments: str, command: Sequence[str] = (sys.executable, __file__), **more: str) -> None:
        self._fd, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **more}
        environment.pop("NO_COLOR", None)
        self._process = subprocess.Popen(
            [*command, *arguments], stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        self.bytes = 0
        self.seen = b""
        """What was written since this was emptied."""
        self._tail = b""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def frames(self, quiet: float, patience: float) -> list[float]:
        """When each frame ended, until ``quiet`` seconds without one; none if none came for ``patience``."""
        ends: list[float] = []
        begin = time.perf_counter()
        while True:
            until = ends[-1] + quiet if ends else begin + patience
            left = until - time.perf_counter()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return ends
            data = os.read(self._fd, 1 << 16)
            now = time.perf_counter()
            self.bytes += len(data)
            self.seen += data
            seen = self._tail + data
            if b"\x1b[?2026$p" in seen:
                os.write(self._fd, b"\x1b[?2026;2$y")
            if FRAME_END in seen:
                ends.append(now)
            self._tail = seen[-(len(FRAME_END) - 1) :] if not seen.endswith(FRAME_END) else b""

    @property
    def processor_ms(self) -> float:
        """Milliseconds of processor time that the process has used so far, by its clock (clock_getcpuclockid)."""
        return time.clock_gettime_ns(~self._process.pid << 3 | 2) / 1e6

    def press(self, key: str) -> tuple[float, float, float]:
        """Milliseconds from a key to the end of the first and of the last frame it caused, and of processor time."""
        used, begin = self.processor_ms, time.perf_counter()
        os.write(self._fd, KEYS.get(key, key).encode())
        first = self.frames(0.0, PATIENCE)
        if not first:
            raise RuntimeError(f"the key {key!r} painted nothing in {PATIENCE} s")
        used = self.processor_ms - used
        last = self.frames(SETTLED, SETTLED) or first
        return (first[0] - begin) * 1000, (last[-1] - begin) * 1000, used

    def most_resident(self) -> float:
        """MiB that were resident at the most (VmHWM)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """A terminal with this file's process of these arguments, whose first picture is complete."""
    opened = Terminal(*arguments)
    try:
        if not opened.frames(0.5, 20.0):
            raise RuntimeError("the console painted nothing in 20 s")
        yield opened
    finally:
        opened.close()


@dataclass(frozen=True)
class Press:
    """A key, and when it was painted: milliseconds to the end of the first frame, of the last, of processor time."""

    key: str
    first: float
    settled: float
    used: float


def _pressed(opened: Terminal, keys: Sequence[str]) -> list[Press]:
    return [Press(key, *opened.press(key)) for key in keys]


@cache
def measured() -> tuple[list[Press], dict[str, list[Press]], float]:
    """The floor's presses, the console's by what was on the screen, and MiB; measured once."""
    with terminal("empty") as opened:
        floor = _pressed(opened, ["a"] * 100)
    with _big_table() as table, terminal("console", str(table)) as opened:
        tables = _pressed(opened, TABLE_KEYS)
        for key in [":", *"pfn guest:big", "enter"]:
            opened.press(key)
        opened.frames(0.5, 1.0)
        shown = _pressed(opened, MAP_KEYS)
        named = {"tables of 10,000 rows": tables, "PFN map of 1,000,000 extents": shown}
        return floor, named, opened.most_resident()


@contextlib.contextmanager
def _big_table() -> Iterator[Path]:
    """A file with the 1,000,000 extents of the guest ``big``."""
    sys.path.insert(0, str(HERE.parent))
    from support.synthetic import SyntheticSource, big_snapshot

    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory) / "big.extents"
        with SyntheticSource(big_snapshot()).extents("guest:big") as made:
            assert len(made) == 1_000_000
            table.write_bytes(made.to_bytes())
        yield table


def _p99(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[98]


def bench_keys() -> list[Result]:
    """Median and 99th percentile from a key to a painted frame, until nothing more is painted, and resident memory."""
    floor, named, resident = measured()
    least = [press.first for press in floor]
    results = []
    for name, presses in named.items():
        first = [press.first for press in presses]
        settled = statistics.median(press.settled for press in presses)
        results += [
            Result(
                f"key to frame, {name}, median",
                statistics.median(first),
                "ms",
                statistics.median(least),
                16.0,
                absolute=True,
            ),
            Result(f"key to frame, {name}, p99", _p99(first), "ms", _p99(least), 16.0, absolute=True),
            Result(
                f"key to frame, {name}, processor time, median",
                statistics.median(press.used for press in presses),
                "ms",
                statistics.median(press.used for press in floor),
                16.0,
                absolute=True,
            ),
            Result(
                f"key to frame, {name}, processor time, p99",
                _p99([press.used for press in presses]),
                "ms",
                _p99([press.used for press in floor]),
                16.0,
                absolute=True,
            ),
            Result(f"key to settled, {name}, median", settled, "ms", statistics.median(least)),
        ]
    return [*results, Result("console, most resident", resident, "MiB", goal=120.0)]


def bench_start() -> list[Result]:
    """Processor time until the first frame with data, against the import of textual.app; both from bytecode on disk."""
    sys.path.insert(0, str(HERE.parent))
    from msgspec import json
    from msgspec.structs import replace
    from support.synthetic import snapshot

    def start(file: Path, more: dict[str, str]) -> float:
        opened = Terminal("open", str(file), command=(sys.executable, "-m", "memconsole"), **more)
        try:
            while b"db1" not in opened.seen:
                if not opened.frames(0.0, 20.0):
                    raise RuntimeError("the console showed no data in 20 s")
            return opened.processor_ms
        finally:
            opened.close()

    def floor(more: dict[str, str]) -> float:
        child = subprocess.Popen([sys.executable, "-c", "import textual.app"], env={**os.environ, **more})
        _, _, used = os.wait4(child.pid, 0)
        return (used.ru_utime + used.ru_stime) * 1000

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "host.json"
        file.write_bytes(json.encode(replace(snapshot(), tables=())))
        more = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{directory}/bytecode"}
        more["XDG_STATE_HOME"] = directory
        found = [(start(file, more), floor(more)) for _ in range(6)][1:]
    least = min(used for _, used in found)
    return [Result("first frame with data, processor time", min(used for used, _ in found), "ms", least, 2.0)]


def bench_idle() -> list[Result]:
    """What a console does that nobody touches: 10,000 regions and 1,000 guests, ten of each change each second."""
    results = []
    with _big_table() as table, terminal("console", str(table)) as opened:
        for key, what in (("", "overview"), ("2", "regions")):
            if key:
                opened.press(key)
            opened.frames(0.5, 2.0)
            used, written, begin = opened.processor_ms, opened.bytes, time.perf_counter()
            while time.perf_counter() < begin + IDLE:
                opened.frames(0.0, 1.0)
            past = time.perf_counter() - begin
            part = (opened.processor_ms - used) / past / 10
            results += [
                Result(f"console left alone, processor time, {what}", part, "%", goal=1.0),
                Result(
                    f"console left alone, bytes a refresh, {what}", (opened.bytes - written) / past, "B", goal=300.0
                ),
            ]
    return results


def _main() -> None:
    if sys.argv[1:2] == ["console"]:
        _console(sys.argv[2])
    elif sys.argv[1:2] == ["empty"]:
        _empty()
    else:
        floor, named, resident = measured()
        print(
            f"{resident:.0f} MiB{'':26} first frame: median    max   settled: median    max   processor: median   max"
        )
        for name, presses in {"empty app": floor, **named}.items():
            print(f"{name}, processor time: p99 {_p99([press.used for press in presses]):.1f}")
            for key in dict.fromkeys(press.key for press in presses):
                first = [press.first for press in presses if press.key == key]
                settled = [press.settled for press in presses if press.key == key]
                used = [press.used for press in presses if press.key == key]
                figures = [
                    value for times in (first, settled, used) for value in (statistics.median(times), max(times))
                ]
                print(f"{name:29}{key!r:10}{len(first):4} " + "".join(f"{figure:11.1f}" for figure in figures))


if __name__ == "__main__":
    _main()
