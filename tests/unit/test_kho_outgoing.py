"""What a running kernel hands over, beside what was meant: sessions by who holds them, frames by KHO's tree."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.kernel.census import Census, Process
from memconsole.backend.kernel.handover import outgoing
from memconsole.backend.kernel.handover.values import Run
from memconsole.cli import main
from memconsole.errors import ExitCode
from memconsole.model import LiveSession


def process(pid: int, *links: str) -> Process:
    return Process(pid, "mc-keeper", "S", 1, 5, 0, False, dict(enumerate(links)), b"", pid, parent=1)


def test_sessions_are_found_by_the_links_of_everybody(tmp_path: Path) -> None:
    exempt = tmp_path / "proc" / "9" / "fd"
    exempt.mkdir(parents=True)
    (exempt / "4").symlink_to("anon_inode:[luo_session] memconsole:web")
    (exempt / "5").symlink_to("/memfd:memconsole:web (deleted)")
    seen = Census(tmp_path, {7: process(7, "anon_inode:[luo_session] memconsole:web", "/dev/null")}, ())
    found = outgoing.sessions(seen, tmp_path, [9, 10])
    assert found == (LiveSession("memconsole:web", (7, 9)),)


runs = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8).map(
    lambda pairs: tuple(
        Run(sum(gap + count for gap, count in pairs[:row]) + pairs[row][0], pairs[row][1]) for row in range(len(pairs))
    )
)


@given(runs, st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), max_size=5))
def test_the_overlap_is_counted_frame_by_frame(tree: tuple[Run, ...], frames: list[tuple[int, int]]) -> None:
    inside = {pfn for run in tree for pfn in range(run.pfn, run.pfn + run.count)}
    assert outgoing.overlap(tree, frames) == sum(pfn + at in inside for pfn, count in frames for at in range(count))


def test_a_kernel_without_handover_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(OSError):
        if os.listdir("/sys/kernel/debug/kho"):  # noqa: PTH208 - whether it is there is all that counts
            pytest.skip("this kernel has KHO")
    assert main(["inspect"]) == ExitCode.FAILED
    assert "hands nothing over" in capsys.readouterr().err
