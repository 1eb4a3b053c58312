"""memcached as a service on a region: told to save, started again, warm; through rehearsals, kill -9 and failures."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import controls, databases
from support.faultpoints import fault_points
from support.memcached import Memcached as Spoken
from support.mounted import Place, places, unexpected
from support.mounts import NOBODY
from support.waiting import until

from memconsole import actions as do
from memconsole.errors import MemconsoleError
from memconsole.model import Condition, GuestState, HandoffState

MIB = 64
"""memcached takes 39 MiB at least."""
ITEMS = 2000


@pytest.fixture
def place() -> Iterator[Place]:
    with places() as place:
        yield place


class Memcached:
    """A memcached that is guest ``mc``: in its directory are a socket, a link to its file, and what it writes down."""

    def __init__(self, place: Place) -> None:
        if shutil.which("memcached") is None:
            pytest.skip("memcached is not installed")
        self.place = place
        self.home = place.service.directory / "mc"
        self.home.mkdir()
        os.chown(self.home, NOBODY, NOBODY)
        (self.home / "cache").symlink_to(place.path("mc", "cache"))
        self.socket = self.home / "socket"
        self.spoken = Spoken(self.socket)

    def command(self) -> str:
        return f"memcached -s {self.socket} -m {MIB} -e {self.home / 'cache'}"

    def add(self, **more: object) -> None:
        """As docs/databases.md has it."""
        self.place.client.apply(do.Reserve("cache", MIB << 20))
        words = {"exec": self.command(), "user": str(NOBODY), "save_signal": "USR1", "within": 30.0, **more}
        self.place.client.apply(do.GuestService("mc", **words))  # type: ignore[arg-type]
        self.place.client.apply(do.Map("cache", "mc"))
        self.place.client.apply(do.GuestResume("mc"))
        self.place.at_end(self.end)

    def end(self) -> None:
        with contextlib.suppress(MemconsoleError):
            self.place.service.guests.add(self.pid())

    def pid(self) -> int:
        return controls.guest(self.place.client.snapshot(), "mc").pid or 0

    def fill(self) -> None:
        self.spoken.fill(ITEMS)

    def answers(self) -> bool:
        return self.spoken.answers()

    def wrong(self) -> int:
        """How many items it does not have as they were."""
        until(self.answers, "memcached answers")
        return self.spoken.missing(range(ITEMS))


@pytest.fixture
def cache(place: Place) -> Memcached:
    made = Memcached(place)
    made.add(ready=f"test -S {made.socket}")
    until(made.answers, "memcached answers")
    made.fill()
    assert not made.wrong()
    return made


def condition(place: Place, id: str) -> Condition:
    return next(each for each in place.client.plan(do.HandoffRun()).conditions if each.id == id)


def test_memcached_comes_up_warm_after_a_rehearsal_beside_a_canary(place: Place, cache: Memcached) -> None:
    place.client.apply(do.GuestStart("c0", memory=4 << 20))
    before = cache.pid()
    assert place.path("mc", "cache").stat().st_uid == NOBODY
    assert condition(place, "guest-process").ok
    assert condition(place, "guest-cold").ok
    plan = place.client.plan(do.HandoffRehearse())
    ids = [effect.id for effect in plan.effects]
    assert ids.index("tell-mc") < ids.index("saved-mc") < ids.index("pause-c0")
    place.client.apply(do.HandoffRehearse())
    assert not cache.wrong()
    assert cache.pid() not in {0, before}
    report = place.client.snapshot().handoff
    assert report is not None
    assert report.state is HandoffState.DONE
    results = {each.name: each for each in report.guests}
    assert {name: each.back for name, each in results.items()} == {"c0": True, "mc": True}
    assert results["mc"].blackout_ns
    assert "tell" in {phase.id for phase in report.phases}
    shown = place.shown()
    assert not unexpected(shown)
    assert controls.guest(shown, "mc").state is GuestState.RUNNING


def test_it_survives_the_control_process_at_the_points_of_its_saving(place: Place, cache: Memcached) -> None:
    """Killed, it is warm again, by the next control process; with MEMCONSOLE_SOAK=1 at every point."""
    points = [each for each in fault_points(place.client.plan(do.HandoffRehearse())) if "-mc." in each]
    assert len(points) == 4
    points += [f"guest-resume.{step}.{when}" for step in ("start", "ready") for when in ("before", "after")]
    if not os.environ.get("MEMCONSOLE_SOAK"):
        points = ["handoff-rehearse.tell-mc.after", "guest-resume.start.after"]
    for point in points:
        place.restart(point)
        before = cache.pid()
        with contextlib.suppress(MemconsoleError):  # a guest is resumed behind it
            place.client.apply(do.HandoffRehearse())
        assert place.service.process is not None
        assert place.service.process.wait(60) == -signal.SIGKILL, point
        place.stop()
        place.start()
        if point.endswith("tell-mc.before"):
            assert cache.pid() == before, point
        else:
            until(lambda old=before: cache.pid() not in {0, old}, f"mc is started again after {point}")  # type: ignore[misc]
        assert not cache.wrong(), point
    assert not unexpected(place.shown())


def test_a_handoff_that_is_taken_back_starts_it_again(place: Place, cache: Memcached) -> None:
    """It saved, and a second service does not: the first one is started at once, the other once it has ended."""
    deaf = "import signal, sys; signal.signal(15, lambda *_: print('told', flush=True)); input(); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", deaf], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        place.client.apply(do.GuestAttach("deaf", process.pid, exec="sleep 999", within=1.0))
        before = cache.pid()
        with pytest.raises(MemconsoleError, match="deaf has not saved"):
            place.client.apply(do.HandoffRehearse())
        assert not cache.wrong()
        assert cache.pid() != before
        assert controls.guest(place.client.snapshot(), "deaf").pid == process.pid, "it is left as it is"
        process.kill()
    until(lambda: controls.guest(place.shown(), "deaf").pid not in {None, process.pid}, "it is started again")
    place.service.guests.add(controls.guest(place.client.snapshot(), "deaf").pid or 0)
    report = place.client.snapshot().handoff
    assert report is not None
    assert (report.state, "deaf has not saved" in report.why) == (HandoffState.FAILED, True)


@pytest.mark.parametrize("kind", ["lmdb", "sqlite"])
def test_a_database_has_its_rows_after_a_rehearsal_and_after_kill_9(place: Place, kind: str) -> None:
    size, rows = 16 << 20, 2000
    home = place.service.directory / "db"
    home.mkdir()
    out = home / "out"
    place.client.apply(do.Reserve("db", size))
    with place.owners("db").open("r+b") as file:
        file.write(databases.seed(kind, size))
    (home / "data.mdb").symlink_to(place.path("db", "db"))
    where = home if kind == "lmdb" else place.path("db", "db")
    command = shlex.join(databases.words(kind, where, size, rows, out))
    ready = f"test -e {out}"
    place.client.apply(do.GuestService("db", exec=command, ready=ready))
    place.client.apply(do.Map("db", "db"))
    place.client.apply(do.GuestResume("db"))
    assert databases.told(out)[:2] == [0, rows]
    out.unlink()
    place.client.apply(do.HandoffRehearse())
    assert databases.told(out)[:2] == [rows, rows]
    pid = controls.guest(place.client.snapshot(), "db").pid or 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    assert not unexpected(place.shown()), "what it forks is no intruder"
    out.unlink()
    for each in (pid, *(int(child) for child in children)):
        os.kill(each, signal.SIGKILL)
    until(lambda: controls.guest(place.shown(), "db").state is GuestState.GONE, "it is gone")
    (gone,) = [each for each in place.client.snapshot().findings if each.id == "guest-gone"]
    assert "memconsole guest resume db" in gone.remedy
    place.client.apply(do.GuestResume("db"))
    assert databases.told(out)[:2] == [rows, rows]
    pid = controls.guest(place.client.snapshot(), "db").pid or 0
    place.service.guests |= {pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())}
