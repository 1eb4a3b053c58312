"""How processes are held, and how programs are started that outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import until

from memconsole.backend.kernel import census, memfds, procmaps
from memconsole.backend.peers.handle import Handle, stat
from memconsole.errors import Gone, Silent

SWAPPED = """
import fcntl, os, sys
from pathlib import Path
from memconsole.backend.peers.handle import GIVEN_FD, Handle, spawn

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
    program.wait(300)
"""


def test_a_program_finds_what_it_is_given_in_order_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "log"
    subprocess.run([sys.executable, "-c", SWAPPED, str(log)], check=True, env=dict(os.environ))
    text, _, count = log.read_text().rpartition(" ")
    assert text == "first second third"
    assert int(count) == 7, "three it was given, three of its own, and the directory"


LEAVES = """
import ctypes, mmap, sys, threading
memory = mmap.mmap(int(sys.argv[1]), 1 << 20)
memory[:5] = b"first"
def work():
    print("up", flush=True)
    for line in sys.stdin:
        memory[: len(line) - 1] = line[:-1].encode()
        print("done", flush=True)
threading.Thread(target=work).start()
sys.stdout.flush()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93, "riscv64": 93}[sys.argv[2]], 0)
"""
"""A process whose first thread leaves, and which goes on to write to memory that it maps."""


def test_a_process_whose_first_thread_has_left_is_held_stopped_and_ended_as_any_other() -> None:
    fd = os.memfd_create("held", os.MFD_CLOEXEC)
    os.ftruncate(fd, 1 << 20)
    inode = os.fstat(fd)
    words = [sys.executable, "-c", LEAVES, str(fd), os.uname().machine]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True) as child:
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            until(lambda: stat(child.pid)[0] == "Z", "its first thread has left")
            seen = census.take()
            process = seen.processes[child.pid]
            assert process.state in "SRD"
            assert process.task != child.pid
            assert [pid for pid, _ in seen.mappings({(inode.st_dev, inode.st_ino)})] == [child.pid]
            held = memfds.holders(seen, {(inode.st_dev, inode.st_ino)})
            assert {pid for pid, _ in held} == {os.getpid(), child.pid}
            (vma,) = [vma for vma in procmaps.vmas("/", child.pid, process.task) if vma.inode == inode.st_ino]
            assert procmaps.resident("/", child.pid, [vma], process.task) == [4096]
            with Handle(child.pid) as handle:
                assert handle.alive()
                assert not handle.stopped()
                handle.signal(signal.SIGSTOP)
                until(handle.stopped, "all of its threads are stopped")
                handle.signal(signal.SIGCONT)
                until(lambda: not handle.stopped(), "it goes on")
                child.stdin.write("later\n")
                child.stdin.flush()
                assert child.stdout.readline() == "done\n"
                assert os.pread(fd, 5, 0) == b"later"
                handle.kill()
                assert not handle.alive()
            with pytest.raises(Gone):
                Handle(child.pid)
        finally:
            child.kill()
            os.close(fd)


def test_a_process_that_was_let_go_of_by_another_thread_cannot_be_told() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        handle = Handle(process.pid)
        handle.close()
        for ask in (handle.alive, handle.check, lambda: handle.wait(0), lambda: handle.signal(signal.SIGKILL)):
            with pytest.raises(Silent):
                ask()
        assert process.poll() is None
        process.kill()
