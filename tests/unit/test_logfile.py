"""The log of a service in the background: bounded, with what was before beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.waiting import LONG_S

CODE = """
import logging, os, sys
from pathlib import Path
from memconsole.backend import logfile
logfile.LARGEST = 20_000
path = Path(sys.argv[1])
fd = logfile.opened(path)
os.dup2(fd, 2)
os.close(fd)
logging.basicConfig(handlers=[logfile.RotatingStderr(path)])
for number in range(2000):
    logging.warning("line %d %s", number, "x" * 90)
logging.warning("long %s end", "y" * 1_000_000)
logging.warning("after")
os.write(2, b"by another\\n")
"""


def test_it_is_rotated_and_what_is_kept_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    path.write_text("before\n" * 10)
    subprocess.run([sys.executable, "-c", CODE, path], check=True)
    files = [path, *(tmp_path / f"serve.log.{number}" for number in (1, 2, 3))]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(file.stat().st_size < 20_000 + 17_000 for file in files)
    assert {file.stat().st_mode & 0o777 for file in files[:2]} == {0o600}
    said = "".join(file.read_text() for file in reversed(files))
    assert "before" not in said
    assert said.index("line 1998") < said.index("line 1999") < said.index("long yyy")
    assert "characters left out" in said
    assert path.read_text().endswith("after\nby another\n")


UNREAD = """
import logging
from memconsole.backend import logfile
logging.basicConfig(handlers=[logfile.Detached(logfile.Stderr())], format="%(message)s")
for number in range(20_000):
    logging.warning("line %d %s", number, "x" * 90)
print("done", flush=True)
if input() == "log":
    logging.warning("after")
"""


def test_a_stream_that_nobody_reads_holds_nothing_up() -> None:
    words = [sys.executable, "-c", UNREAD]
    with subprocess.Popen(
        words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        said = process.communicate("log\n")[1].splitlines()
        assert process.returncode == 0
    assert said[0].startswith("line 0 x")
    assert [line for line in said if line.endswith("lines left out")]
    assert said[-1] == "after" or said[-1].endswith("lines left out")


def test_the_end_waits_for_no_reader_and_is_no_crash() -> None:
    words = [sys.executable, "-c", UNREAD]
    with subprocess.Popen(
        words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait(LONG_S) == 0


def test_what_is_logged_is_written_before_the_end() -> None:
    code = UNREAD.replace("20_000", "100").replace("input()", "'log'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split(" x")[0] for line in done.stderr.splitlines()] == [*(f"line {n}" for n in range(100)), "after"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "serve.log").symlink_to(tmp_path / "elsewhere")
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "serve.log"], capture_output=True, check=False)
    assert done.returncode != 0
    assert (tmp_path / "elsewhere").read_text() == ""
