"""A database that is warm in the next kernel, or after a restart here, against one that is filled again.

Warm: from the start of its process until it answers, its data in a region. Filled: the same data, put in anew.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import statistics
import time

from harness import Result, Skip
from labs import RESUME, said
from support import controls, databases
from support.memcached import Memcached
from support.mounted import Place, places
from support.waiting import until

from memconsole.actions import GuestResume, GuestService, Map, Reserve
from memconsole.model import GuestState

PATIENCE_S = 300.0
STARTS = 3
"""Warm starts, of which the one in the middle counts."""
ITEMS, ROWS, SIZE = 500_000, 200_000, 128 << 20
NAMES = {
    "mc": (f"memcached, {ITEMS:,} items", 1 / 10),
    "lm": (f"LMDB, {ROWS:,} rows", 1 / 50),
    "sq": (f"SQLite, {ROWS:,} rows", 1 / 100),
}


def bench_warm() -> list[Result]:
    """memcached, LMDB and SQLite over a kexec."""
    if shutil.which("memcached") is None:
        raise Skip("memcached is not installed")
    words = [str(word) for word in (ITEMS, ROWS, SIZE)]
    (figures,) = said("handoff_services", "figures", *words, memory="3G", early=RESUME)
    return [
        Result(
            f"warm after a kexec, {name}, against filling again", figures["warm"][id], "s", figures["cold"][id], goal
        )
        for id, (name, goal) in NAMES.items()
    ]


def bench_warm_here() -> list[Result]:
    """The same over a restart of the programs on this host: they save, end, and are started again on their regions."""
    if os.geteuid() != 0 or shutil.which("memcached") is None:
        raise Skip("needs root, and memcached")
    with places() as place:
        took = {"mc": memcached(place), "lm": database(place, "lm", "lmdb"), "sq": database(place, "sq", "sqlite")}
    return [
        Result(f"warm after a restart, {name}, against filling again", took[id][1], "s", took[id][0], goal)
        for id, (name, goal) in NAMES.items()
    ]


def memcached(place: Place) -> tuple[float, float]:
    """Seconds to fill it, and seconds from its start until it answers with its items."""
    home = place.service.directory / "home"
    home.mkdir()
    (home / "mc").symlink_to(place.path("mc", "mc"))
    socket = home / "socket"
    command = f"memcached -u root -s {socket} -m {SIZE >> 20} -t 1 -e {home}/mc"
    ready = f"test -S {socket}"
    started(place, "mc", GuestService("mc", exec=command, save_signal="SIGUSR1", ready=ready, within=PATIENCE_S))
    cache = Memcached(socket, PATIENCE_S)
    until(cache.answers, "memcached answers", PATIENCE_S)
    began = time.monotonic()
    cache.fill(ITEMS)
    cold = time.monotonic() - began
    before = cache.items()
    warm = []
    for _ in range(STARTS):
        again(place, "mc", signal.SIGUSR1)
        until(cache.answers, "memcached answers", PATIENCE_S)
        warm.append(time.clock_gettime(time.CLOCK_BOOTTIME) - begun(place, "mc"))
        assert cache.items() == before > ITEMS * 0.9, "it is cold"
    return cold, statistics.median(warm)


def database(place: Place, name: str, kind: str) -> tuple[float, float]:
    """Seconds until a database answers that is empty, and until it does with its rows."""
    home, out = place.service.directory / name, place.service.directory / f"{name}.out"
    home.mkdir()
    where = place.path(name, name)
    if kind == "lmdb":
        (home / "data.mdb").symlink_to(where)
        where = home
    command = shlex.join(databases.words(kind, where, SIZE, ROWS, out))
    service = GuestService(name, exec=command, ready=f"test -e {out}", within=PATIENCE_S)
    started(place, name, service, databases.seed(kind, SIZE))
    until(out.exists, f"{name} answers", PATIENCE_S)
    cold = databases.told(out)
    warm = []
    for _ in range(STARTS):
        out.unlink()
        again(place, name, signal.SIGTERM)
        until(out.exists, f"{name} answers", PATIENCE_S)
        warm.append(databases.told(out))
    assert cold[:2] == [0, ROWS]
    assert all(each[:2] == [ROWS, ROWS] for each in warm)
    return cold[2], statistics.median(each[2] for each in warm)


def started(place: Place, name: str, service: GuestService, contents: bytes = b"") -> None:
    """A service on a region of its own, from the beginning."""
    place.client.apply(Reserve(name, SIZE))
    if contents:
        with (place.point / "regions" / name).open("r+b") as into:
            into.write(contents)
    place.client.apply(service)
    place.client.apply(Map(name, name))
    place.client.apply(GuestResume(name))
    place.at_end(lambda: place.service.guests.add(pid(place, name)))


def again(place: Place, name: str, number: signal.Signals) -> None:
    """Have it save and end, and start it."""
    os.kill(pid(place, name), number)
    until(lambda: state(place, name) is GuestState.GONE, f"{name} has ended", PATIENCE_S)
    place.client.apply(GuestResume(name))


def pid(place: Place, name: str) -> int:
    return controls.guest(place.client.snapshot(), name).pid or 0


def state(place: Place, name: str) -> GuestState:
    """What its process is doing, as the Snapshot has it."""
    return controls.guest(place.client.snapshot(), name).state


def begun(place: Place, name: str) -> float:
    """When its process began, in seconds since the boot."""
    return (controls.guest(place.client.snapshot(), name).start_ticks or 0) / os.sysconf("SC_CLK_TCK")
