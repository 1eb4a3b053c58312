"""kill -9 behind the jump: of memconsole-resume, and of the control process that takes over, at each of their points.

landing_faults [N] [qemu]       stage 2: memconsole-resume is started until it has died at each of its points in turn.
                                With N, the control process too; in stage 3 the control process alone is started, and
                                memconsole-resume by it; and in N stages more memconsole-resume dies once, at one of
                                its points, and the next start of it does the rest.

Points are found by dying at them (native/faultpoint.h); nobody but the programs knows them.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from support import lab_guest as lab
from support import lab_host as host

from memconsole.actions import GuestStart, Reserve
from memconsole.backend import steps
from memconsole.backend.wire.client import Client
from memconsole.model import GuestState
from memconsole.native import program

SINGLE = int(sys.argv[1]) if len(sys.argv) > 1 else 0
QEMU = "qemu" in sys.argv
CANARIES = ("c0", "c1")
GUESTS = (*CANARIES, *(("vm",) if QEMU else ()))
NOTES = lab.SHARE / "notes.json"
POINTS = lab.SHARE / "points"
LOG = Path("/run/early.log")
LAST = 2 if not SINGLE else 3 + SINGLE
UNDER_WAY = ("incoming:", "started:", "session:", "state:")


def resume(fault: str) -> int:
    """One start of memconsole-resume."""
    env = os.environ | ({steps.FAULT_VARIABLE: fault} if fault else {})
    with LOG.open("ab") as log:
        done = subprocess.run([program("memconsole-resume")], env=env, stdout=log, stderr=log, check=False)
    return done.returncode


def vmms() -> dict[str, int]:
    """How many processes each guest has."""
    found: collections.Counter[str] = collections.Counter()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"canary" in words[0] or b"qemu" in words[0]:
            found[words[words.index(b"--name" if b"canary" in words[0] else b"-name") + 1].decode()] += 1
    return dict(found)


def died(seen: Path, start: Callable[[str], bool]) -> list[str]:
    """Start something until it does not die any more; the points at which it did. No guest is ever there twice."""
    while not start(f"@{seen}"):
        twice = {name: count for name, count in vmms().items() if count > 1}
        if twice:
            lab.say("twice", ok=False, twice=twice, points=seen.read_text())
    return seen.read_text().splitlines()


def begin() -> Client:
    client = host.serve()
    for name in CANARIES:
        client.apply(GuestStart(name, memory=8 << 20))
    if QEMU:
        client.apply(GuestStart("vm", vmm="qemu", memory=32 << 20))
    client.apply(Reserve("spare", 4 << 20, prefault=True))
    return client


def landed() -> Client:
    """Take over what was handed over, with everybody dying at everything."""
    here = Path("/run")
    if lab.stage() == 2:
        points = died(here / "resume.points", lambda fault: resume(fault) != -9)
        lab.say("resume-points", len(points) > 20, points=points)
        lab.say("second", resume("") in {0, 6}, held=host.held())
        POINTS.write_text("\n".join(points))
    elif lab.stage() > 3:
        points = POINTS.read_text().splitlines()
        point = points[(lab.stage() - 4) * len(points) // SINGLE]
        codes = [resume(point), resume("")]
        lab.say(f"single-{point}", codes == [-9, 0], codes=codes, log=LOG.read_text())
    if not SINGLE or lab.stage() > 3:
        return host.serve()
    clients: list[Client] = []

    def start(fault: str) -> bool:
        client = host.try_to_serve(fault)
        clients.extend([client] if client else [])
        return client is not None

    points = died(here / "serve.points", start)
    lab.say("serve-points", len(points) > 8, points=points)
    host.end(clients[-1])  # it would die at points of what it is asked to do, too
    return host.serve()


def held_to(client: Client) -> None:
    """Everybody is what they were, once, and nothing is left of how they came here."""
    notes = json.loads(NOTES.read_text())
    why = host.all_count_on(client, CANARIES, notes)
    lab.say("count-on", not why, why=why)
    snapshot = host.heard(client)
    states = {guest.name: guest.state for guest in snapshot.guests}
    lab.say("run", states == dict.fromkeys(GUESTS, GuestState.RUNNING), states=states)
    lab.say("once", vmms() == dict.fromkeys(GUESTS, 1), vmms=vmms())
    report = snapshot.handoff
    assert report is not None
    lab.say("report", report.state == "done" and all(each.back for each in report.guests), report=str(report))
    lab.say("same", len(report.regions) == len(GUESTS) + 1 and all(each.same for each in report.regions))
    left = [name for name in host.held() if name.startswith(UNDER_WAY) or name == "resume"]
    lab.say("tidy", not left, left=left)
    bad = [each for each in snapshot.findings if each.severity != "info"]
    said = LOG.read_text() if LOG.exists() else ""  # in stage 3 the control process's own log has it
    lab.say("findings", not bad, findings=msgspec.to_builtins(bad), log=said[-2000:])


def swept(client: Client) -> None:
    """Every canary has checked all of its memory since the jump."""
    goals = {guest.name: guest.memory // 4096 for guest in client.snapshot().guests if guest.name in CANARIES}
    first = {guest.name: guest.progress for guest in client.snapshot().guests}
    deadline = time.monotonic() + host.PATIENCE
    while goals and time.monotonic() < deadline:
        for guest in client.snapshot().guests:
            before, now = first.get(guest.name), guest.progress
            if guest.name in goals and before and now and now.checked - before.checked >= goals[guest.name]:
                lab.say(f"whole-{guest.name}", now.wrong == 0, progress=str(now))
                del goals[guest.name]
        time.sleep(0.2)
    lab.say("swept", not goals, missing=goals)


def main() -> None:
    if lab.stage() == 1:
        client = begin()
        why = host.all_count_on(client, CANARIES)
        lab.say("before", not why, why=why)
    else:
        client = landed()
        held_to(client)
        swept(client)
    if lab.stage() < LAST:
        NOTES.write_text(json.dumps(host.beats(client, CANARIES)))
        host.plan(client, host.action())
        client.apply(host.action())
        raise AssertionError("the handoff returned")
    lab.say("end")


main()
