"""A process that holds the lock of its memory map for ever keeps nobody waiting who looks at it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from support.controls import M, controls, guest
from support.stuck_file import locked_up
from support.waiting import until

from memconsole import actions as do
from memconsole.backend.kernel import pagemap, patient, procmaps, tree
from memconsole.errors import MemconsoleError, Silent
from memconsole.model import GuestState


def is_blocked(pid: int) -> bool:
    """Whether its first thread sleeps in the kernel, and cannot be waked."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_guest_that_is_locked_up_is_a_gap_and_the_rest_of_the_snapshot_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "WITHIN_S", 0.5)
    with controls() as control, contextlib.ExitStack() as stack:
        control.apply(do.GuestStart("c", memory=4 * M))
        stuck = stack.enter_context(locked_up(tmp_path))
        control.apply(do.GuestAttach("db", stuck.pid))
        assert stuck.stdin is not None
        stuck.stdin.write(b"map it\n")
        stuck.stdin.flush()
        until(lambda: is_blocked(stuck.pid), "it is locked up")
        for _ in range(3):
            taken = control.snapshot()
            assert guest(taken, "c").state is GuestState.RUNNING
            assert guest(taken, "c").seen is not None
            db = guest(taken, "db")
            assert (db.state is not GuestState.GONE, db.seen) == (True, None)
            assert [
                gap.why for gap in taken.gaps if "lock of its memory map" in gap.why and str(stuck.pid) in gap.source
            ]
        with pytest.raises(MemconsoleError, match="memory map"):
            tree.read("/", f"/proc/{stuck.pid}/smaps")
        stack.close()
        until(lambda: not patient._blocked, "the reader came back")
        until(lambda: guest(control.snapshot(), "db").state is GuestState.GONE, "it has ended")
        control.apply(do.GuestStop("c"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_the_page_map_of_one_that_is_locked_up_is_given_up_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patient, "WITHIN_S", 0.5)
    with locked_up(tmp_path) as stuck:
        (ram, *_) = [vma for vma in procmaps.vmas("/", stuck.pid) if vma.path == "[heap]"]
        span = pagemap.Span(ram.start, ram.size, 0)
        with pagemap.scan(stuck.pid, [span]) as table:
            assert table.pages * 4096 == ram.size
            assert table.stats().present
        assert stuck.stdin is not None
        stuck.stdin.write(b"map it\n")
        stuck.stdin.flush()
        until(lambda: is_blocked(stuck.pid), "it is locked up")
        for _ in range(3):
            with pytest.raises(Silent, match=f"process {stuck.pid} does not show its memory"):
                pagemap.scan(stuck.pid, [span])
        with pagemap.scan(os.getpid(), [pagemap.Span(*own_heap(), 0)]) as table:
            assert table.stats().present
    until(lambda: not patient._blocked, "the reader came back")


def own_heap() -> tuple[int, int]:
    """Where this process's heap begins, and its bytes."""
    (heap, *_) = [vma for vma in procmaps.vmas("/", os.getpid()) if vma.path == "[heap]"]
    return heap.start, heap.size
