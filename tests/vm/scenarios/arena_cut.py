"""Regions of an arena made, moved and given up without end, until the power is cut; what was said to be done is there.

arena_cut TURN LAST     the power of every turn but the last is cut by the test (tests/vm/test_arena.py)

What is done is written down beside it: ``make NAME`` and ``made NAME DIGEST``, ``give NAME`` and ``given NAME``.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from contextlib import closing

from support import lab_guest as lab
from support import lab_host as host

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.model import Rung

M = 1 << 20
SIZE = 4 * M
TURN, LAST = int(sys.argv[1]), int(sys.argv[2])
DONE = lab.SHARE / "done"
KEPT = 6
"""So many regions are there at a time."""


def write_down(*words: str) -> None:
    with DONE.open("a") as file:
        file.write(" ".join(words) + "\n")
        file.flush()
        os.fsync(file.fileno())


def opened(name: str) -> int:
    with closing(KeeperCustody(paths.runtime_dir() / "keeper")) as keeper:
        return keeper.get(f"region:{name}:0")[0]


def digest(name: str) -> str:
    fd = opened(name)
    try:
        return hashlib.sha256(os.pread(fd, SIZE, 0)).hexdigest()[:32]
    finally:
        os.close(fd)


def meant() -> tuple[dict[str, str], set[str]]:
    """The regions that have to be there, with their digests; and those that may be."""
    there: dict[str, str] = {}
    maybe: set[str] = set()
    for line in DONE.read_text().splitlines():
        what, name, *more = line.split()
        maybe.discard(name)
        if what == "made":
            there[name] = more[0]
        else:
            there.pop(name, None)
        if what in {"make", "give"}:
            maybe.add(name)
    return there, maybe


def look(client: Client) -> None:
    """All that was done is there with every byte, nothing is half there, and there is nothing that was not begun."""
    there, maybe = meant()
    found = {region.name: region for region in host.shown(client).regions}
    lab.say("there", set(there) <= set(found) <= set(there) | maybe, there=sorted(there), found=sorted(found))
    wrong = [name for name, before in there.items() if name in found and digest(name) != before]
    lab.say("bytes", not wrong, wrong=wrong)
    runs = {name: host.frames(client, f"region:{name}") for name in found}
    whole = all(len(each) == 1 and each[0][1] == SIZE // 4096 and not each[0][0] % 512 for each in runs.values())
    lab.say("whole", whole and all(each.size == SIZE for each in found.values()), runs=runs)
    told = {each.id for each in host.heard(client).findings if each.id.startswith("arena")}
    lab.say("replayed", told == {"arena-replayed"}, told=sorted(told))
    code, text = host.said("arena", "check")
    lab.say("checked", code == 0, text=text)
    for name in maybe & set(found):
        give(client, name)


def give(client: Client, name: str) -> None:
    write_down("give", name)
    client.apply(do.Release(name))
    write_down("given", name)


def move(client: Client, name: str) -> None:
    """Have its contents go to another file: the name that counts changes in the middle of it."""
    fd = opened(name)
    client.apply(do.GuestAttach("holder", os.getpid()))
    grant = client.apply(do.Map(name, "holder")).subject
    client.apply(do.Revoke(grant, at_most=Rung.COPY))
    client.apply(do.GuestStop("holder"))
    os.close(fd)


def go_on(client: Client) -> None:
    for number in itertools.count():
        name = f"r{TURN}-{number}"
        write_down("make", name)
        client.apply(do.Reserve(name, SIZE, "dax"))
        fd = opened(name)
        os.pwrite(fd, os.urandom(4096) * (SIZE // 4096), 0)
        os.close(fd)
        write_down("made", name, digest(name))
        move(client, name)
        there, _ = meant()
        if len(there) > KEPT:
            give(client, next(iter(there)))
        lab.say("went-on", number=number)


def main() -> None:
    client = host.serve()
    if TURN == 0:
        client.apply(do.ArenaCreate("lab"))
        DONE.touch()
    else:
        look(client)
    if TURN < LAST:
        go_on(client)
    lab.say("end")


main()
