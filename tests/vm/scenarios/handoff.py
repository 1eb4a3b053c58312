"""A handoff as an operator makes it; in the next kernel memconsole-resume comes first of all, then serve.

handoff [JUMPS] [MB,MB...] [qemu]       as many kexecs in a row; a canary of each size; a QEMU too
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from support import lab_guest as lab
from support import lab_host as host

from memconsole import timeline
from memconsole.actions import GuestStart, GuestStop, HandoffRun, Map, Release, Reserve, Revoke
from memconsole.backend.wire.client import Client
from memconsole.model import GuestState, Progress

builtins = msgspec.to_builtins

JUMPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1
SIZES = [int(word) for word in sys.argv[2].split(",")] if len(sys.argv) > 2 else [32, 16]
QEMU = "qemu" in sys.argv
NOTES = lab.SHARE / "notes.json"
FIGURES = lab.SHARE / "figures.json"
MEMORY_SPREAD = 256 << 10
WORKERS = 8
"""Threads the control process starts when callers come (wire/server.py), however many kernels there were."""


def names() -> list[str]:
    return [f"c{row}" for row in range(len(SIZES))] + (["vm"] if QEMU else [])


def swept(client: Client, name: str) -> Progress:
    """A canary's own word, once it has checked every page of its memory twice since it was asked."""
    pages = 2 * host.guest(client.snapshot(), name).memory // 4096
    goal = host.beaten(client, name).checked + pages
    deadline = time.monotonic() + host.PATIENCE
    while time.monotonic() < deadline:
        progress = host.guest(client.snapshot(), name).progress
        if progress is not None and progress.checked >= goal:
            return progress
        time.sleep(0.2)
    raise AssertionError(f"{name} does not check {pages} pages: {host.guest(client.snapshot(), name)}")


def least(directory: Path) -> int:
    """How many entries a directory of /proc has when nothing is under way."""
    looks = []
    for _ in range(10):
        looks.append(len(list(directory.iterdir())))
        time.sleep(0.1)
    return min(looks)


def figures(client: Client) -> dict[str, int]:
    """What may not grow from one kernel to the next (invariant I5), and what is told with it."""
    found = {}
    for name, words in (("keeper", ["-x", "mc-keeper"]), ("control", ["-f", "memconsole serve"])):
        pids = subprocess.run(["pgrep", *words], capture_output=True, text=True, check=True).stdout.split()
        found[f"{name}-processes"] = len(pids)
        for what, where in (("fds", "fd"), ("threads", "task")):
            found[f"{name}-{what}"] = least(Path(f"/proc/{pids[0]}/{where}"))
    memory = client.snapshot().memory
    return {**found, "total": memory.total, "free": memory.free, "available": memory.available}


def same_as_before(found: dict[str, int]) -> None:
    """From the second kernel on, which was the first to take anything over, nothing grows."""
    told = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    if lab.stage() > 1:
        FIGURES.write_text(json.dumps([*told, found]))
    counted = [name for name in found if name.endswith(("-processes", "-fds", "-threads"))]
    spread = {"control-threads": WORKERS}
    changed = {
        name: (told[0][name], found[name])
        for name in counted
        if told and found[name] > told[0][name] + spread.get(name, 0)
    }
    if told and told[0]["total"] - found["total"] > MEMORY_SPREAD:  # a boot's own memory differs by a few pages
        changed["total"] = (told[0]["total"], found["total"])
    lab.say("figures", not changed, changed=changed, **found)


def begin() -> Client:
    client = host.serve()
    for row, size in enumerate(SIZES):
        client.apply(GuestStart(f"c{row}", memory=size << 20))
    if QEMU:
        client.apply(GuestStart("vm", vmm="qemu", memory=64 << 20))
    client.apply(Reserve("spare", 4 << 20))
    return client


def action() -> HandoffRun:
    share = str(lab.SHARE)
    return HandoffRun(f"{share}/bzImage", f"{share}/initrd", lab.next_command_line())


def jump(client: Client) -> None:
    """Check, plan, and go; the last that is heard of this kernel."""
    plan = host.plan(client, action())
    bad = [each for each in plan.conditions if not each.ok]
    lab.say("check", not plan.refusals, conditions=len(plan.conditions), not_ok=builtins(bad))
    beats = {name: swept(client, name) for name in names() if name != "vm"}
    same_as_before(figures(client))
    lab.say("before", all(each.wrong == 0 for each in beats.values()), **{k: v.beats for k, v in beats.items()})
    NOTES.write_text(json.dumps({name: each.beats for name, each in beats.items()}))
    client.apply(action())
    raise AssertionError("the handoff returned")


def landed() -> Client:
    """Adopt as init and the unit would, and hold everybody to what was."""
    code, err = (Path(f"/run/early.{what}").read_text().strip() for what in ("code", "log"))
    lab.say("early", code == "0", code=code, err=err)
    client = host.serve()
    notes = json.loads(NOTES.read_text())
    for name in names():
        found = host.guest(client.snapshot(), name)
        lab.say(f"runs-{name}", found.state is GuestState.RUNNING, guest=str(found))
        if name in notes:
            progress = host.beaten(client, name, notes[name])
            lab.say(f"goes-on-{name}", progress.wrong == 0, before=notes[name], progress=str(progress))
    snapshot = host.heard(client)
    report = snapshot.handoff
    assert report is not None
    lab.say("report", report.state == "done" and all(each.back for each in report.guests), report=builtins(report))
    lab.say("same", len(report.regions) == len(names()) + 1 and all(each.same for each in report.regions))
    lab.say("blackout", all(each.blackout_ns for each in report.guests), shown=timeline.lines(report, 140))
    spare = next(each for each in snapshot.regions if each.name == "spare")
    lab.say("restored", spare.state == "restored", spare=str(spare))
    bad = [each for each in snapshot.findings if each.severity != "info"]
    lab.say("findings", not bad, findings=builtins(bad))
    return client


def last(client: Client) -> None:
    """What was carried is ordinary memory again: it is mapped, given up and freed."""
    beats = {name: swept(client, name) for name in names() if name != "vm"}
    lab.say("whole", all(each.wrong == 0 for each in beats.values()), **{k: str(v) for k, v in beats.items()})
    same_as_before(figures(client))
    made = client.apply(Map("spare", "c0"))
    client.apply(Revoke(made.subject))
    client.apply(Release("spare"))
    for name in names():
        client.apply(GuestStop(name))
        client.apply(Release(name))
    lab.say("freed", client.snapshot().regions == ())


def main() -> None:
    client = begin() if lab.stage() == 1 else landed()
    if lab.stage() <= JUMPS:
        jump(client)
    last(client)
    lab.say("end")


main()
