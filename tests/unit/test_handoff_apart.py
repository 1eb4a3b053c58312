"""Files that others name as a kernel: what is no regular file is not opened, what unpacks without end is ended."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bzimages import ELF, PACKERS, bzimage
from support.waiting import LONG_S

from memconsole.backend.handoff import apart, facts, image
from memconsole.backend.handoff.apart import TooSlow
from memconsole.errors import BadFile, NotFound


def inspect(path: str, **more: float) -> image.KernelImage:
    fd = image.opened(path)
    try:
        return apart.inspect(path, fd, **more)
    finally:
        os.close(fd)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("make", [a_fifo, a_socket, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_refused_without_being_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "kernel")
    with pytest.raises(BadFile, match="regular"):
        image.opened(str(tmp_path / "kernel"))
    with pytest.raises(BadFile, match="regular"):
        facts._size(str(tmp_path / "kernel"))
    with pytest.raises(BadFile, match="regular"):
        image.load(str(tmp_path / "kernel"), None, "")


def test_it_is_told_as_it_is_told_here(tmp_path: Path) -> None:
    path = bzimage(tmp_path / "vmlinuz", PACKERS["gzip"](ELF))
    fd = image.opened(path)
    try:
        assert inspect(path) == image.inspect(path, fd)
    finally:
        os.close(fd)
    (tmp_path / "text").write_bytes(b"x" * 10_000)
    with pytest.raises(BadFile, match="no kernel image"):
        inspect(str(tmp_path / "text"))


def endless(path: Path) -> str:
    """An image of a MiB that unpacks to more than it may."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(64 << 20)
    start = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    # After a full flush what follows refers to nothing before it: packed once, it stands there any number of times.
    again = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    return bzimage(path, start + again * (image.LARGEST // len(zeros)) + packer.flush())


def test_what_unpacks_to_more_than_a_kernel_is_ended_within_its_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = inspect(endless(tmp_path / "vmlinuz"))
    except BadFile as error:
        assert "MiB" in str(error)  # noqa: PT017 - either bound may be the first one met
    else:
        assert found.abis is None
        assert "more than" in found.why
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < apart.MEMORY >> 10


def test_what_takes_longer_than_it_may_is_killed_with_its_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "zstd"
    tool.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = bzimage(tmp_path / "vmlinuz", b"\x28\xb5\x2f\xfd" + bytes(99))
    refusals: list[BadFile] = []

    def ask() -> None:
        try:
            inspect(path, within=30)
        except TooSlow as error:
            refusals.append(error)

    asking = threading.Thread(target=ask)
    monkeypatch.setattr(subprocess.Popen, "communicate", _timing_out(tmp_path / "pid"))
    asking.start()
    asking.join(60)
    assert "cannot be unpacked" in str(refusals[0])
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + LONG_S
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the tool outlived the process it worked for"
        time.sleep(0.02)


def _timing_out(begun: Path) -> Callable[..., tuple[bytes, bytes]]:
    """A wait that is over as soon as the tool runs."""

    def communicate(self: subprocess.Popen[bytes], *, timeout: float) -> tuple[bytes, bytes]:
        deadline = time.monotonic() + timeout
        while not (begun.exists() and begun.read_text().strip()):
            assert time.monotonic() < deadline
            assert self.poll() is None
            time.sleep(0.02)
        raise subprocess.TimeoutExpired("memconsole", timeout)

    return communicate


def test_modules_never_come_from_the_directory_it_happens_to_be_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit(77)")
    monkeypatch.chdir(tmp_path)
    assert inspect(bzimage(tmp_path / "vmlinuz", PACKERS["none"](ELF))).abis == ("kho-v4", "luo-v5", "memfd-v2")


def test_that_it_took_too_long_is_not_held_against_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [TooSlow("it", "was not within 60 s"), None]

    def look(path: str, fd: int) -> image.KernelImage:
        error = times.pop(0)
        if error is not None:
            raise error
        return image.inspect(path, fd)

    monkeypatch.setattr(apart, "inspect", look)
    good = bzimage(tmp_path / "vmlinuz", PACKERS["none"](ELF))
    with pytest.raises(TooSlow):
        facts._inspected(good)
    assert facts._inspected(good).abis
    assert facts._inspected(good).abis
    assert times == []


def test_what_is_wrong_with_a_file_is_found_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look(path: str, fd: int) -> image.KernelImage:
        asked.append(path)
        return image.inspect(path, fd)

    monkeypatch.setattr(apart, "inspect", look)
    bad = tmp_path / "bad"
    bad.write_bytes(b"x" * 10_000)
    for _ in range(3):
        with pytest.raises(BadFile, match="no kernel image"):
            facts._inspected(str(bad))
    assert asked == [str(bad)]
    good = bzimage(tmp_path / "vmlinuz", PACKERS["none"](ELF))
    assert facts._inspected(good).abis == facts._inspected(good).abis
    os.utime(good, ns=(1, 1))
    facts._inspected(good)
    assert asked.count(good) == 2
    with pytest.raises(NotFound):
        facts._inspected(str(tmp_path / "none"))


def test_a_process_of_its_own_goes_first_when_memory_is_short() -> None:
    code = (
        "from memconsole.backend.handoff import apart; apart._bound(); print(open('/proc/self/oom_score_adj').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1000"


def test_lzma_that_wants_a_huge_dictionary_is_not_given_it(tmp_path: Path) -> None:
    header = b"\x5d" + struct.pack("<I", 0xFFFFFFFF) + b"\xff" * 8
    found = inspect(bzimage(tmp_path / "vmlinuz", header + bytes(100)))
    assert found.abis is None
    assert found.why
