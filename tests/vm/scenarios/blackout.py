"""Blackouts of canaries over kexecs in a row, each as the guest's own clock has it.

blackout FLOOR TURN...   a turn is a kexec: ``ours:MB`` by memconsole, ``floor:MB`` by FLOOR, which is floor_handoff.c

Who begins the next kernel finds in the share which of them led there (``turn``; see bench_handoff.EARLY).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import msgspec
from support import lab_guest as lab
from support import lab_host as host

from memconsole.actions import GuestStart, GuestStop, HandoffRun, Release
from memconsole.backend.wire.client import Client
from memconsole.model import HandoffReport

TURNS = [(kind, int(size) << 20) for kind, size in (word.split(":") for word in sys.argv[2:])]
TURN = lab.SHARE / "turn"
FLOOR = sys.argv[1]
IMAGE = (str(lab.SHARE / "bzImage"), str(lab.SHARE / "initrd"))


def reported(client: Client) -> HandoffReport:
    """The report, once the guest has said how long it stood still."""
    deadline = time.monotonic() + host.PATIENCE
    while time.monotonic() < deadline:
        made = client.snapshot().handoff
        if made is not None and made.guests and all(each.by == "guest" for each in made.guests):
            return made
        time.sleep(0.2)
    raise AssertionError(f"no guest says how long it stood still: {client.snapshot().handoff}")


def collect(client: Client, kind: str, size: int) -> None:
    """What the turn that led here came to; its guest ends."""
    if kind == "floor":
        blackout, phases = int((lab.SHARE / "floor.ns").read_text().split()[-1]), []
    else:
        made = reported(client)
        (guest,) = made.guests
        blackout, phases = guest.blackout_ns or 0, [msgspec.to_builtins(each) for each in made.phases]
        client.apply(GuestStop("c"))
        client.apply(Release("c"))
    lab.say("blackout", blackout > 0, kind=kind, size=size, ns=blackout, phases=phases)


def jump(client: Client, kind: str, size: int) -> None:
    TURN.write_text(kind + "\n")
    line = lab.next_command_line()
    if kind == "ours":
        client.apply(GuestStart("c", memory=size))
        time.sleep(3)  # it beats as it will go on to
        client.apply(HandoffRun(*IMAGE, line))
    else:
        done = subprocess.run([FLOOR, "jump", str(size), *IMAGE, line], capture_output=True, text=True, check=False)
        raise AssertionError(f"the floor did not jump: {done.stderr}")
    raise AssertionError("the handoff returned")


def main() -> None:
    os.sync()
    host.SHMEM_THP.write_text("advise")
    client = host.serve()
    gone = lab.stage() - 1
    if gone:
        collect(client, *TURNS[gone - 1])
    if gone < len(TURNS):
        jump(client, *TURNS[gone])
    lab.say("end")


main()
