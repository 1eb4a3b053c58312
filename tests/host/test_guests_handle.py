"""How programs are started that outlive us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SWAPPED = """
import fcntl, os, sys
from pathlib import Path
from memconsole.backend.guests.handle import GIVEN_FD, Handle, spawn

for number, text in ((GIVEN_FD, b"third "), (GIVEN_FD + 1, b"first "), (GIVEN_FD + 2, b"second ")):
    read, write = os.pipe()
    os.write(write, text)
    os.close(write)
    high = fcntl.fcntl(read, fcntl.F_DUPFD_CLOEXEC, 50 + number)
    os.close(read)
    os.dup2(high, number, inheritable=False)
    os.close(high)
words = ["/bin/sh", "-c", "cat <&3; cat <&4; cat <&5; ls /proc/self/fd | wc -l"]
with spawn(words, Path(sys.argv[1]), GIVEN_FD + 1, GIVEN_FD + 2, GIVEN_FD) as program:
    program.wait(30)
"""


def test_a_program_finds_what_it_is_given_in_order_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", SWAPPED, str(log)], check=True, env=dict(os.environ))
    text, _, count = log.read_text().rpartition(" ")
    assert text == "first second third"
    assert int(count) == 7, "three it was given, three of its own, and the directory"
