"""The console on a real terminal, where keys come in bursts and pastes in brackets."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import synthetic
from support.waiting import LONG_S, until

from memconsole import recording

SIZE = struct.pack("HHHH", 40, 120, 0, 0)


class OnTerminal:
    """A console on a snapshot file, on a terminal of its own."""

    def __init__(self, file: Path) -> None:
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, SIZE)
        words = [str(Path(sys.executable).parent / "memconsole"), "open", str(file)]
        environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self.process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self._painted = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while got := os.read(self._fd, 65536):
                self._painted += got
        except OSError:
            return  # the other end is closed

    def send(self, text: str) -> None:
        """All of it at once."""
        os.write(self._fd, text.encode())

    def painted(self, text: str) -> bool:
        """Whether this was written to the terminal, whatever was painted over it since."""
        return text.encode() in self._painted

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._fd)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[OnTerminal]:
    """A console whose first picture is on the screen."""
    file = tmp_path / "host.snap"
    recording.write(file, synthetic.snapshot(), {})
    made = OnTerminal(file)
    try:
        until(lambda: made.painted("Overview") and made.painted("recorded"), "the first picture")
        yield made
    finally:
        made.close()


def test_what_is_typed_before_the_first_picture_is_done(tmp_path: Path) -> None:
    file = tmp_path / "host.snap"
    recording.write(file, synthetic.snapshot(), {})
    made = OnTerminal(file)
    try:
        until(lambda: made.painted("\x1b[?25l"), "keys are read one by one")  # before, Enter is the end of a line
        made.send(f"5\r:regions web\r:export {tmp_path}/rows.csv\r:quit\r")
        assert made.process.wait(LONG_S) == 0
        assert "web0-ram0" in (tmp_path / "rows.csv").read_text()
    finally:
        made.close()


def test_commands_typed_ahead_are_done_in_turn(terminal: OnTerminal) -> None:
    terminal.send(":regions web\r")
    until(lambda: terminal.painted("/web"), "the regions, filtered")
    terminal.send("3:guests db\r:quit\r")
    assert terminal.process.wait(LONG_S) == 0


def test_marks_columns_and_an_export_typed_ahead_are_done_in_turn(terminal: OnTerminal, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    terminal.send(f"2 j s\x1b[B\r/web\r:export {file}\r:regions\r:quit\r")
    assert terminal.process.wait(LONG_S) == 0
    names = [line.split(",")[0] for line in file.read_text().splitlines()[1:]]
    assert set(names) == {region.name for region in synthetic.snapshot().regions if "web" in region.name}


def test_a_command_line_and_its_text_are_reached_by_a_burst(terminal: OnTerminal) -> None:
    terminal.send(":regions --columns size,na\t --csv\r")
    until(lambda: terminal.painted("size,name"), "the text of the command")
    terminal.send("q:quit\r")
    assert terminal.process.wait(LONG_S) == 0


def test_a_pasted_command_is_done_with_enter(terminal: OnTerminal) -> None:
    terminal.send("\x1b[200~:quit\x1b[201~\r")
    assert terminal.process.wait(LONG_S) == 0


def test_a_pasted_text_that_nothing_takes_does_nothing(terminal: OnTerminal) -> None:
    terminal.send("\x1b[200~qqq\x1b[201~")
    until(lambda: terminal.painted("Nothing here takes what was pasted"), "it says so")
    assert terminal.process.poll() is None
    terminal.send("q")
    assert terminal.process.wait(LONG_S) == 0
