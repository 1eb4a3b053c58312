"""From a key to a painted frame: the console in a real terminal over 10,000 regions, 1,000 guests, 1,000,000 extents.

How it is measured: the console runs in a process of its own on a pseudo-terminal of 132x50. The terminal (this
process) says that it knows synchronized output, so that the console ends every frame with ``ESC [ ? 2 0 2 6 l``. The
clock starts before a key's bytes are written to the terminal and stops when the end of the **last** frame of the answer
has been read: no frame follows for 60 ms. So it holds everything: parsing the key, the action, the compositor, the
driver, the pty. The floor is the same for a Textual app with one line that a key changes. Memory is VmHWM, the most
that was ever resident.

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
from functools import cache
from pathlib import Path

from harness import Result

HERE = Path(__file__).parent
COLUMNS, ROWS = 132, 50
FRAME_END = b"\x1b[?2026l"
SETTLED = 0.06
PATIENCE = 5.0
ENTER, ESCAPE = "\r", "\x1b"
KEYS = {
    "down": "\x1b[B", "up": "\x1b[A", "right": "\x1b[C", "left": "\x1b[D", "pgdn": "\x1b[6~", "pgup": "\x1b[5~",
    "home": "\x1b[H", "end": "\x1b[F", "enter": ENTER, "escape": ESCAPE,
}  # fmt: skip

TABLE_KEYS = (
    ["2"] + ["down"] * 60 + ["pgdn"] * 20 + ["up"] * 20 + ["pgup"] * 5 + ["end", "home"] * 5 + [">", "i"] * 6
    + ["/", *"web12", "escape"] * 3
    + ["3"] + ["down"] * 30 + ["pgdn"] * 10 + [">", "i"] * 4 + ["/", *"cache", "escape"] * 2
    + ["2", "3"] * 10 + list("1234678") * 3
)  # fmt: skip
MAP_KEYS = (
    ["down"] * 15 + ["right"] * 30 + ["+"] * 3 + ["down"] * 60 + ["right"] * 20 + ["pgdn"] * 20 + ["pgup"] * 10
    + ["n"] * 10 + ["N"] * 5 + ["."] * 10 + [","] * 10 + ["-", "+"] * 10 + ["z"] * 6 + ["f"] * 6
    + ["end", "home"] * 6
)  # fmt: skip


# --- the process that is measured -----------------------------------------------------------------------------------


def _console(table: str) -> None:
    sys.path.insert(0, str(HERE.parent))
    from support.synthetic import NOW_NS, SyntheticSource, big_snapshot

    from memconsole.extents import ExtentTable
    from memconsole.views.app import ConsoleApp

    class BigSource(SyntheticSource):
        """Has the table ready in a file, as a control process would have it in a memfd."""

        def extents(self, key: str) -> ExtentTable:
            with Path(table).open("rb") as file:
                return ExtentTable.from_fd(file.fileno())

    ConsoleApp(BigSource(big_snapshot()), interval=1e6, clock=lambda: NOW_NS).run()


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

    def __init__(self, *arguments: str) -> None:
        self._fd, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, __file__, *arguments]
        self._process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)
        self.bytes = 0
        self._tail = b""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def last_frame(self, quiet: float, patience: float = PATIENCE) -> float | None:
        """When the last frame ended before ``quiet`` seconds without one; None when none came for ``patience``."""
        last: float | None = None
        begin = time.perf_counter()
        while True:
            until = begin + patience if last is None else last + quiet
            left = until - time.perf_counter()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return last
            data = os.read(self._fd, 1 << 16)
            now = time.perf_counter()
            self.bytes += len(data)
            seen = self._tail + data
            if b"\x1b[?2026$p" in seen:
                os.write(self._fd, b"\x1b[?2026;2$y")
            if FRAME_END in seen:
                last = now
            self._tail = seen[-(len(FRAME_END) - 1) :] if not seen.endswith(FRAME_END) else b""

    def settle(self, patience: float) -> float | None:
        """Wait until nothing was painted for a second; when the last frame ended, or None if none came in time."""
        return self.last_frame(1.0, patience)

    def press(self, key: str) -> float:
        """Milliseconds from a key to the end of the last frame it caused."""
        begin = time.perf_counter()
        os.write(self._fd, KEYS.get(key, key).encode())
        end = self.last_frame(SETTLED)
        if end is None:
            raise RuntimeError(f"the key {key!r} painted nothing in {PATIENCE} s")
        return (end - begin) * 1000

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
        if opened.settle(20.0) is None:
            raise RuntimeError("the console painted nothing in 20 s")
        yield opened
    finally:
        opened.close()


def _pressed(opened: Terminal, keys: Sequence[str]) -> list[tuple[str, float]]:
    return [(key, opened.press(key)) for key in keys]


@cache
def measured() -> tuple[list[float], list[tuple[str, float]], list[tuple[str, float]], float]:
    """The floor's times, the tables' and the map's by key, and MiB; measured once."""
    with terminal("empty") as opened:
        floor = [took for _, took in _pressed(opened, ["a"] * 100)]
    sys.path.insert(0, str(HERE.parent))
    from support.synthetic import SyntheticSource, big_snapshot

    with tempfile.TemporaryDirectory() as directory:
        table = Path(directory) / "big.extents"
        with SyntheticSource(big_snapshot()).extents("guest:big") as made:
            assert len(made) == 1_000_000
            table.write_bytes(made.to_bytes())
        with terminal("console", str(table)) as opened:
            tables = _pressed(opened, TABLE_KEYS)
            for key in [":", *"pfn guest:big", "enter"]:
                opened.press(key)
            opened.settle(1.0)
            shown = _pressed(opened, MAP_KEYS)
            return floor, tables, shown, opened.most_resident()


def _percentile(times: Sequence[float], part: float) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[round(part * 100) - 1]


def bench_keys() -> list[Result]:
    """Median and 99th percentile from a key to a painted frame, and resident memory."""
    floor, tables, shown, resident = measured()
    results = []
    for name, pressed in (("tables of 10,000 rows", tables), ("PFN map of 1,000,000 extents", shown)):
        times = [took for _, took in pressed]
        for what, value, least, goal in (
            ("median", statistics.median(times), statistics.median(floor), 16.0),
            ("p99", _percentile(times, 0.99), _percentile(floor, 0.99), 33.0),
        ):
            results.append(Result(f"key to frame, {name}, {what}", value, "ms", least, goal, absolute=True))
    return [*results, Result("console, most resident", resident, "MiB", goal=200.0)]


def _main() -> None:
    if sys.argv[1:2] == ["console"]:
        _console(sys.argv[2])
    elif sys.argv[1:2] == ["empty"]:
        _empty()
    else:
        floor, tables, shown, resident = measured()
        print(f"floor: median {statistics.median(floor):.1f} p99 {_percentile(floor, 0.99):.1f} ms; {resident:.0f} MiB")
        for name, pressed in (("tables", tables), ("map", shown)):
            for key in dict.fromkeys(key for key, _ in pressed):
                times = [took for other, took in pressed if other == key]
                print(
                    f"{name:7} {key!r:10} n={len(times):3} median {statistics.median(times):6.1f} max {max(times):6.1f}"
                )


if __name__ == "__main__":
    _main()
