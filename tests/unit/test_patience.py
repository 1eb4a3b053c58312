"""A process is waited for by what it does: a busy one longer than one that sleeps, and none for ever."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memconsole.backend.kernel import schedule
from memconsole.backend.peers.patience import Patience

PID = 4242


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def counts(root: Path, **threads: tuple[float, float]) -> None:
    """What the kernel says of threads: seconds they ran, and waited for a processor."""
    for name, (ran, waited) in threads.items():
        path = root / f"proc/{PID}/task/{name[1:]}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "schedstat").write_text(f"{int(ran * 1e9)} {int(waited * 1e9)} 17\n")


def test_time_that_it_slept_is_held_against_a_process(tmp_path: Path, clock: list[float]) -> None:
    counts(tmp_path, t1=(5, 5))
    patience = Patience(PID, 2.0, root=tmp_path)
    clock[0] += 1.5
    assert patience.left() == pytest.approx(0.5)
    clock[0] += 1.0
    assert patience.left() == 0


@pytest.mark.parametrize("busy", [(1.0, 0.0), (0.0, 1.0), (0.25, 0.75)])
def test_time_that_it_ran_or_waited_for_a_processor_is_not(
    tmp_path: Path, clock: list[float], busy: tuple[float, float]
) -> None:
    counts(tmp_path, t1=(5, 5), t2=(0, 0))
    patience = Patience(PID, 2.0, root=tmp_path)
    for second in range(1, 11):
        clock[0] += 1.0
        counts(tmp_path, t2=(busy[0] * second, busy[1] * second))
        assert patience.left() == pytest.approx(2.0)


def test_one_that_is_busy_for_ever_is_not_waited_for_for_ever(tmp_path: Path, clock: list[float]) -> None:
    counts(tmp_path, t1=(0, 0))
    patience = Patience(PID, 2.0, most=3, root=tmp_path)
    looks = 0
    while patience.left():
        looks += 1
        clock[0] += 1.0
        counts(tmp_path, t1=(looks, 0))
    assert looks == 6


def test_where_the_kernel_does_not_count_the_clock_does(tmp_path: Path, clock: list[float]) -> None:
    patience = Patience(PID, 2.0, root=tmp_path)
    clock[0] += 1.0
    assert patience.left() == pytest.approx(1.0)


@pytest.mark.parametrize("text", ["", "1 2", "1 2 3 4\n", "-1 2 3\n", "x y z\n", "1" * 40 + " 2 3\n", "\0" * 200])
def test_what_is_no_such_line_is_no_thread(tmp_path: Path, text: str) -> None:
    counts(tmp_path, t1=(1, 2))
    broken = tmp_path / f"proc/{PID}/task/2"
    broken.mkdir()
    (broken / "schedstat").write_text(text)
    assert schedule.threads(tmp_path, PID) == {1: (10**9, 2 * 10**9)}


@pytest.fixture
def spinning() -> Iterator[int]:
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as process:
        yield process.pid
        process.kill()


def test_this_kernel_counts(spinning: int) -> None:
    deadline = time.monotonic() + 120
    while sum(schedule.threads("/", spinning).get(spinning, (0, 0))) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_comes_is_waited_for_and_what_does_not_is_given_up(tmp_path: Path, clock: list[float]) -> None:
    given: list[float] = []

    def comes(seconds: float) -> bool:
        given.append(seconds)
        clock[0] += seconds
        counts(tmp_path, t1=(clock[0] - 1000, 0))
        return len(given) == 3

    counts(tmp_path, t1=(0, 0))
    assert Patience(PID, 2.0, root=tmp_path).lasts(comes)
    assert given == pytest.approx([2.0, 2.0, 2.0])
    assert not Patience(PID, 2.0, root=tmp_path / "ended").lasts(
        lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )


def test_without_patience_it_is_the_clock(tmp_path: Path, clock: list[float]) -> None:
    counts(tmp_path, t1=(0, 0))
    strict = Patience(PID, 2.0, most=1, root=tmp_path)
    clock[0] += 1.5
    counts(tmp_path, t1=(1.5, 0))
    assert strict.left() == pytest.approx(0.5)
