"""What memory costs to carry: preserve, retrieve, and verify memfds of 4 KiB and of 2 MiB folios over one kexec.

carry_cost MB
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import lab_guest as lab
import lab_host as host

from memconsole.backend.handoff import image, luo
from memconsole.extents import ExtentTable, digest_fd

SIZE = int(sys.argv[1]) << 20
NOTES = lab.SHARE / "notes.json"
ROUNDS = 3


def timed(act: Callable[[], object]) -> int:
    began = time.perf_counter_ns()
    act()
    return time.perf_counter_ns() - began


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
            session = luo.Session.create(f"cost-{kind}")
            took.append(timed(lambda fd=fds[kind], session=session: session.preserve(fd, 1)))
            if row < ROUNDS:
                session.close()
        sessions.append(session)
        notes[kind] = {"preserve_ns": took, "placed": placement(fds[kind]), "contents": digest_fd(fds[kind])}
    NOTES.write_text(json.dumps(notes))
    image.load(str(lab.SHARE / "bzImage"), str(lab.SHARE / "initrd"), lab.next_command_line())
    lab.jump()


def second() -> None:
    for kind, known in json.loads(NOTES.read_text()).items():
        session = luo.Session.retrieve(f"cost-{kind}")
        taken: list[int] = []
        retrieve = timed(lambda session=session, taken=taken: taken.append(session.retrieve_fd(1)))
        found: list[object] = []
        places = timed(lambda taken=taken, found=found: found.append(list(placement(taken[0]))))
        contents = timed(lambda taken=taken, found=found: found.append(digest_fd(taken[0])))
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
        os.close(taken[0])
    lab.say("end")


first() if lab.stage() == 1 else second()
