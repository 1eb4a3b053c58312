"""What memory costs to carry: preserve, retrieve, and verify memfds of 4 KiB and of 2 MiB folios over one kexec.

carry_cost MB
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from support import lab_guest as lab
from support import lab_host as host
from support.luo_incoming import Incoming

from memconsole.backend.handoff import image, luo
from memconsole.extents import ExtentTable, digest_fd

SIZE = int(sys.argv[1]) << 20
NOTES = lab.SHARE / "notes.json"
ROUNDS = 3


T = TypeVar("T")


def timed(act: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    act()
    return time.perf_counter_ns() - began


def measured(act: Callable[[], T]) -> tuple[int, T]:
    """How many nanoseconds it took, and what came of it."""
    began = time.perf_counter_ns()
    made = act()
    return time.perf_counter_ns() - began, made


def full() -> int:
    """A memfd with every page in place."""
    fd = host.filled(SIZE)
    os.pwrite(fd, os.urandom(1 << 20), SIZE // 2)
    return fd


def placement(fd: int) -> tuple[str, int]:
    """Where its pages are, as a digest, and in how many runs."""
    with ExtentTable.scan_fd(fd, SIZE) as table:
        return table.digest(), len(table)


def first() -> None:
    """Preserve each a few times: the first moves what lies in KHO's scratch."""
    fds, notes, sessions = {}, {}, []
    for kind in host.page_sizes():
        fds[kind] = full()
        took = []
        for row in range(ROUNDS + 1):
            session = luo.LuoSession.create(f"cost-{kind}")
            took.append(timed(partial(session.preserve, fds[kind], 1)))
            if row < ROUNDS:
                session.close()
        sessions.append(session)
        notes[kind] = {"preserve_ns": took, "placed": placement(fds[kind]), "contents": digest_fd(fds[kind])}
    NOTES.write_text(json.dumps(notes))
    image.load(str(lab.SHARE / "bzImage"), str(lab.SHARE / "initrd"), lab.next_command_line())
    lab.jump()


def second() -> None:
    for kind, known in json.loads(NOTES.read_text()).items():
        session = Incoming.retrieve(f"cost-{kind}")
        retrieve, fd = measured(partial(session.retrieve_fd, 1))
        places, placed = measured(partial(placement, fd))
        contents, digest = measured(partial(digest_fd, fd))
        found: list[object] = [list(placed), digest]
        lab.say(
            "cost",
            found == [known["placed"], known["contents"]],
            kind=kind,
            runs=known["placed"][1],
            preserve_ns=known["preserve_ns"],
            retrieve_ns=retrieve,
            places_ns=places,
            contents_ns=contents,
        )
        session.finish()
        os.close(fd)
    lab.say("end")


first() if lab.stage() == 1 else second()
