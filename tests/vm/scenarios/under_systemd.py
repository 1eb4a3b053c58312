"""The units of this project under a real systemd: a kill, an ordinary kexec that is refused, its fd store, a handoff.

under_systemd [all] [faults] [forced] [busy]
    all     stops, restarts and kills of each kind, on both sides
    faults  memconsole-resume.service dies at each of its points, and is started again each time
    forced  before the handoff ``systemctl kexec --force``, by which systemd 261 and newer carries its fd stores
    busy    another process has the next kernel's device open for longer than memconsole-resume waits for it
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from support import lab_guest as lab
from support import lab_host as host
from support.waiting import until

from memconsole import paths
from memconsole.actions import Action, GuestStart, GuestStop, HandoffRehearse, Release, Reserve
from memconsole.backend.kernel.census import links
from memconsole.backend.wire.client import Client
from memconsole.errors import NoControl
from memconsole.model import Condition, GuestState, Plan, Severity

GUESTS = ("c0", "c1")
CONTENTS = b"known contents, page after page\n" * 4096
OTHER = Path("/etc/systemd/system/other.service")
ALL, FAULTS, FORCED, BUSY = (word in sys.argv for word in ("all", "faults", "forced", "busy"))
HANDED = 3 if FORCED else 2
"""The stage behind the handoff."""
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


def condition(id: str, action: Action) -> Condition:
    return next(each for each in host.plan(client(), action).conditions if each.id == id)


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
    found = condition("custody", HandoffRehearse()).observed
    stores = version() >= 254 and stage < HANDED  # behind a jump of ours the keeper has everything
    lab.say("custody", ("systemd" in found) == stores, custody=found)
    lab.say("fdstore", (int(shown("memconsole.service", "NFileDescriptorStore")) > 0) == stores)
    cgroups = {pid: Path(f"/proc/{pid}/cgroup").read_text().strip() for pid in pids().values()}
    unit = "memconsole.service" if stage < HANDED else "memconsole-resume.service"
    lab.say("cgroups", all(unit in each for each in cgroups.values()), cgroups=cgroups)


def written() -> None:
    """Known contents, by a descriptor of the process that has the region."""
    main = int(shown("memconsole.service", "MainPID"))
    for fd, said in links("/", main).items():
        if said.startswith("/memfd:memconsole:spare:"):
            with Path(f"/proc/{main}/fd/{fd}").open("r+b") as file:
                file.write(CONTENTS)
            return
    lab.say("written", ok=False, why="the service has no descriptor of region spare")


def whole() -> bool:
    """Whether the contents are those that were written."""
    fds = client().open_region("spare")
    try:
        return os.pread(fds[0], len(CONTENTS), 0) == CONTENTS
    finally:
        for fd in fds:
            os.close(fd)


def kexec_is_refused(name: str) -> None:
    """Whoever asks for an ordinary kexec is told what to do instead, and nothing is stopped."""
    lab.load()
    before = pids()
    beats = host.beats(client(), before)
    for words in (["kexec"], ["isolate", "kexec.target"]):
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
        fine = done.returncode != 0 and "use-memconsole-handoff-run" in done.stderr
        jobs = systemctl("list-jobs", "--no-legend")
        lab.say(f"{name}-{words[0]}", fine and "kexec" not in jobs, said=done.stderr, jobs=jobs)
    why = host.all_count_on(client(), before, beats)
    lab.say(name, not why and pids() == before, why=why, pids=(before, pids()))


def another_unit() -> None:
    """A unit of somebody else with a descriptor in systemd's fd store is named before the jump that would lose it."""
    OTHER.write_text(
        "[Service]\nType=notify\nFileDescriptorStoreMax=4\nFileDescriptorStorePreserve=yes\n"
        f"ExecStart={sys.executable} {Path(__file__).with_name('stores_a_file.py')}\n"
    )
    systemctl("daemon-reload")
    systemctl("start", OTHER.name)
    found = condition("fdstore-left", host.action())
    named = not found.ok and OTHER.name in found.observed and found.severity is Severity.WARNING
    lab.say("fdstore-left", named if version() >= 254 else found.ok, evidence=found.observed)
    systemctl("stop", OTHER.name)
    systemctl("clean", "--what=fdstore", OTHER.name)


def first() -> None:
    units()
    if ALL:
        systemctl("stop", "memconsole.service")
        lab.say("stopped", shown("memconsole.service", "ActiveState") == "inactive")
        client()
        by = shown("memconsole.socket", "NAccepted")
        lab.say("activated", shown("memconsole.service", "ActiveState") == "active", by=by)
    talks = client()
    for name in GUESTS:
        lab.say(f"started-{name}", text=talks.apply(GuestStart(name, memory=8 << 20)).text)
    talks.apply(Reserve("spare", 4 << 20, prefault=True))
    written()
    lives_through("killed", "kill", "--kill-who=main", "--signal=SIGKILL", "memconsole.service")
    ready(1)
    if ALL:
        lives_through("restarted", "restart", "memconsole.service")
        lives_through("stopped-and-called", "stop", "memconsole.service")
    another_unit()
    kexec_is_refused("kexec-refused")
    regions = {each.name: each.state for each in client().snapshot().regions}
    lab.say("regions", set(regions) == {*GUESTS, "spare"}, regions=regions)


def came() -> None:
    """Behind a kexec of systemd's own: memory is there and known, guests have ended and are said to have."""
    units()
    talks = client()
    shown_now = host.fresh(talks)
    regions = {each.name: each.state for each in shown_now.regions if each.seen is not None and each.seen.retrieved}
    lab.say("came", set(regions) == {*GUESTS, "spare"}, regions=regions, all=str(shown_now.regions))
    lab.say("came-whole", whole())
    states = {each.name: each.state for each in shown_now.guests}
    lab.say("came-guests", states == dict.fromkeys(GUESTS, GuestState.GONE), states=states)
    found = [(each.id, each.subject) for each in shown_now.findings if each.severity != "info"]
    wanted = [("kexec-foreign", "host"), *(("guest-ended", name) for name in GUESTS)]
    lab.say("came-findings", sorted(found) == sorted(wanted), findings=msgspec.to_builtins(shown_now.findings))
    remedies = [each.remedy for each in shown_now.findings]
    lab.say("came-remedies", not any("release" in each for each in remedies), remedies=remedies)
    made = plan()
    bad = sorted(each.id for each in made.conditions if not each.ok)
    lab.say("came-check", not made.refusals and "guest-ended" in bad, refusals=str(made.refusals), bad=bad)
    talks.apply(GuestStop("c0"))
    talks.apply(GuestStop("c1"))
    talks.apply(Release("c0"))
    talks.apply(Release("c1"))
    for name in GUESTS:
        talks.apply(GuestStart(name, memory=8 << 20))
    left = [each for each in host.findings(talks) if each[0] != "kexec-foreign"]
    lab.say("came-goes-on", not host.all_count_on(talks, GUESTS) and not left, left=left)
    ready(2)


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
    waited = not (FAULTS or BUSY) or version() >= 254  # older ones let others go on while they start it again
    lab.say("early", not waited or all(early <= when for when in began.values()), began=began)
    restarts = int(shown("memconsole-resume.service", "NRestarts"))
    points = Path("/run/early.points")
    lab.say("died", (restarts > 20) == FAULTS, restarts=restarts, points=points.read_text() if points.exists() else "")
    report = talks.snapshot().handoff
    assert report is not None
    lab.say("report", report.state == "done" and all(each.back for each in report.guests), report=str(report))
    lab.say("same", len(report.regions) == 3 and all(each.same for each in report.regions) and whole())
    bad = [each for each in talks.snapshot().findings if each.severity != "info"]
    wanted = ["handoff-device-busy"] if BUSY else []
    lab.say("findings", [each.id for each in bad] == wanted, findings=msgspec.to_builtins(bad))
    if BUSY:
        named = all("sleep" in each.observed for each in bad)
        lab.say("busy", named and restarts > 0, restarts=restarts, findings=msgspec.to_builtins(bad))
    ready(HANDED)
    if ALL:
        lives_through("killed-behind", "kill", "--kill-who=main", "--signal=SIGKILL", "memconsole.service")
        lives_through("restarted-behind", "restart", "memconsole.service")
    kexec_is_refused("kexec-refused-behind")
    before = pids()
    systemctl("restart", "memconsole-resume.service")
    running = {each.name: each.state for each in client().snapshot().guests}
    fine = pids() == before and set(running.values()) == {GuestState.RUNNING}
    lab.say("resume-again", fine and shown("memconsole-resume.service", "ActiveState") == "active", before=before)
    kexec_is_let_begin()
    for pid in before.values():
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kexec_is_let_begin() -> None:
    """With the last guest and region gone, what refused is gone too."""
    talks = client()
    for name in GUESTS:
        talks.apply(GuestStop(name))
    for name in (*GUESTS, "spare"):
        talks.apply(Release(name))
    wants = shown("kexec.target", "Requires").split()
    lab.say("kexec-may-begin", wants == ["systemd-kexec.service"], wants=wants)


def main() -> None:
    if lab.stage() == HANDED:
        second()
        lab.say("end")
        return
    if lab.stage() == 1:
        first()
        if FORCED:
            said = systemctl("kexec", "--force")
            time.sleep(host.PATIENCE)
            lab.say("forced", ok=False, said=said)
            return
    else:
        came()
    until(lambda: not plan().refusals, "nothing refuses, and the image is looked at", host.PATIENCE)
    share = lab.SHARE
    words = ["handoff", "run", "--kernel", f"{share}/bzImage", "--initrd", f"{share}/initrd", "--yes"]
    command = [host.TOOL, *words, "--append", lab.next_command_line()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=host.PATIENCE * 4)
    lab.say("handoff", ok=False, code=done.returncode, text=done.stdout + done.stderr)


main()
