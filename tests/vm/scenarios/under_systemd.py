"""The units of this project under a real systemd: sockets, restarts, kills, its fd store, and a handoff.

under_systemd [faults]      faults: memconsole-resume.service dies at each of its points, and is started again each time
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lab_guest as lab
import lab_host as host
import msgspec

from memconsole import paths
from memconsole.actions import GuestStart, Reserve
from memconsole.backend.wire.client import Client
from memconsole.errors import NoControl
from memconsole.model import GuestState, Plan

GUESTS = ("c0", "c1")
FAULTS = "faults" in sys.argv
UNITS = ("memconsole.service", "memconsole.socket", "memconsole-resume.service")


def systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def shown(unit: str, name: str) -> str:
    return systemctl("show", "--value", "-p", name, unit)


def version() -> int:
    return int(systemctl("--version").split()[1])


def client() -> Client:
    """A connection to the service, which systemd starts if nobody serves its socket."""
    deadline = time.monotonic() + host.PATIENCE
    while True:
        if DEAF and shown("memconsole.service", "ActiveState") == "inactive":
            systemctl("start", "memconsole.service")
        try:
            return Client(paths.control_socket())
        except NoControl:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


DEAF = 254 <= version() < 257
"""It does not listen for a stopped service whose fd store it keeps: mended in 257 (systemd, pull request 33874)."""


def pids() -> dict[str, int | None]:
    return {guest.name: guest.pid for guest in client().snapshot().guests}


def plan() -> Plan:
    return host.plan(client(), host.action())


def custody() -> str:
    return next(each.evidence for each in plan().conditions if each.id == "custody")


def lives_through(name: str, act: str, *words: str) -> None:
    """Something happens to the service; another one takes its place, and guests notice nothing."""
    before, main = pids(), shown("memconsole.service", "MainPID")
    beats = host.beats(client(), GUESTS)
    said = systemctl(act, *words)
    deadline = time.monotonic() + host.PATIENCE
    while shown("memconsole.service", "MainPID") in {main, "0"} and time.monotonic() < deadline:
        if act == "stop":
            client()
        time.sleep(0.1)
    why = host.all_count_on(client(), GUESTS, beats)
    now = shown("memconsole.service", "MainPID")
    lab.say(
        name,
        not why and pids() == before and now not in {main, "0"},
        why=why,
        said=said,
        main=(main, now),
        pids=(before, pids()),
        stored=shown("memconsole.service", "NFileDescriptorStore"),
        findings=[str(each) for each in client().snapshot().findings],
    )


def units() -> None:
    """What the units are at, and what systemd thinks of them."""
    states = {unit: shown(unit, "ActiveState") for unit in UNITS}
    lab.say("units", set(states.values()) == {"active"}, states=states, version=version(), dmesg=said_of_units())
    verified = subprocess.run(
        ["systemd-analyze", "verify", *(f"/etc/systemd/system/{unit}" for unit in UNITS)],
        capture_output=True,
        text=True,
        check=False,
    )
    known = ("FileDescriptorStorePreserve", "RestartMode") if version() < 254 else ()
    words = [line for line in verified.stderr.splitlines() if "memconsole" in line]
    words = [line for line in words if not any(f"Unknown key '{each}'" in line for each in known)]
    lab.say("verified", not words, words=words)


def said_of_units() -> list[str]:
    """Warnings about the units, as systemd logs them when it reads them."""
    log = Path("/run/lab/console")
    text = log.read_text(errors="replace") if log.exists() else ""
    return [line for line in text.splitlines() if "memconsole" in line and "systemd" in line][-20:]


def ready(stage: int) -> None:
    """The service is there, with custody where its systemd can have it."""
    found = custody()
    stores = version() >= 254 and stage == 1  # behind a jump the keeper has everything
    lab.say("custody", ("systemd" in found) == stores, custody=found)
    lab.say("fdstore", (int(shown("memconsole.service", "NFileDescriptorStore")) > 0) == stores)
    cgroups = {pid: Path(f"/proc/{pid}/cgroup").read_text().strip() for pid in pids().values()}
    unit = "memconsole.service" if stage == 1 else "memconsole-resume.service"
    lab.say("cgroups", all(unit in each for each in cgroups.values()), cgroups=cgroups)


def first() -> None:
    units()
    systemctl("stop", "memconsole.service")
    lab.say("stopped", shown("memconsole.service", "ActiveState") == "inactive")
    talks = client()
    lab.say(
        "activated", shown("memconsole.service", "ActiveState") == "active", by=shown("memconsole.socket", "NAccepted")
    )
    for name in GUESTS:
        lab.say(f"started-{name}", text=talks.apply(GuestStart(name, memory=8 << 20)).text)
    talks.apply(Reserve("spare", 4 << 20, prefault=True))
    ready(1)
    lives_through("killed", "kill", "--kill-who=main", "--signal=SIGKILL", "memconsole.service")
    lives_through("restarted", "restart", "memconsole.service")
    lives_through("stopped-and-called", "stop", "memconsole.service")
    regions = {each.name: each.state for each in client().snapshot().regions}
    lab.say("regions", set(regions) == {*GUESTS, "spare"}, regions=regions)


def second() -> None:
    """The guests are there before anybody asks for them, and go on being there."""
    talks = client()
    log = lab.SHARE / "memconsole-resume.log"
    why = host.all_count_on(talks, GUESTS)
    logs = {path.parent.name: path.read_text()[-1000:] for path in Path("/run/memconsole/guests").glob("*/log")}
    lab.say("go-on", not why, why=why, log=log.read_text()[-2000:] if log.exists() else "", logs=logs)
    units()
    began = {unit: int(shown(unit, "ActiveEnterTimestampMonotonic")) for unit in (*UNITS, "sysinit.target")}
    early = began["memconsole-resume.service"]
    waited = not FAULTS or version() >= 254  # older ones let others go on while they start it again
    lab.say("early", not waited or all(early <= when for when in began.values()), began=began)
    restarts = int(shown("memconsole-resume.service", "NRestarts"))
    points = Path("/run/early.points")
    lab.say("died", (restarts > 20) == FAULTS, restarts=restarts, points=points.read_text() if points.exists() else "")
    report = talks.snapshot().handoff
    assert report is not None
    lab.say("report", report.state == "done" and all(each.back for each in report.guests), report=str(report))
    lab.say("same", len(report.regions) == 3 and all(each.same for each in report.regions))
    bad = [each for each in talks.snapshot().findings if each.severity != "info"]
    lab.say("findings", not bad, findings=msgspec.to_builtins(bad))
    ready(2)
    lives_through("killed-behind", "kill", "--kill-who=main", "--signal=SIGKILL", "memconsole.service")
    lives_through("restarted-behind", "restart", "memconsole.service")
    before = pids()
    systemctl("restart", "memconsole-resume.service")
    running = {each.name: each.state for each in client().snapshot().guests}
    fine = pids() == before and set(running.values()) == {GuestState.RUNNING}
    lab.say("resume-again", fine and shown("memconsole-resume.service", "ActiveState") == "active", before=before)
    for pid in before.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    if lab.stage() > 1:
        second()
        lab.say("end")
        return
    first()
    share = lab.SHARE
    words = ["handoff", "run", "--kernel", f"{share}/bzImage", "--initrd", f"{share}/initrd", "--yes"]
    lab.say("planned", not plan().refusals)
    command = [host.TOOL, *words, "--append", lab.next_command_line()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=host.PATIENCE * 4)
    lab.say("handoff", ok=False, code=done.returncode, text=done.stdout + done.stderr)


main()
