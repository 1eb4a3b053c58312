"""Canaries over two kexecs: preserved, saved, planned; the keeper jumps; memconsole-resume is the first thing to run.

Argument: what goes wrong on purpose (``broken``: the boot plan has a wrong byte; ``moved``: one guest's frames are not
what the plan says; ``unfit``: one guest's state is spoiled, and one session is not there; ``homeless``: there cannot be
a keeper in the second kernel), or nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from support import lab_guest as lab

from memconsole.agent import Type
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.exports.fd import Hub
from memconsole.backend.exports.offer import Offer
from memconsole.backend.guests.canary import CanaryGuest
from memconsole.backend.handoff import bootplan, luo
from memconsole.backend.handoff.bootplan import BootPlan, ClockReading, Hold, Start, Verify
from memconsole.backend.stores import memfd
from memconsole.errors import KernelRefused, MemconsoleError
from memconsole.extents import ExtentTable
from memconsole.model import Access
from memconsole.native import program

MIB = 1 << 20
GUESTS = {"one": 16 * MIB, "two": 64 * MIB, "three": 1 * MIB}
RUNTIME = Path("/run/memconsole")
NOTES = lab.SHARE / "notes.json"
HOW = sys.argv[1] if len(sys.argv) > 1 else ""


class Notes(msgspec.Struct):
    """What one kernel tells the next, for the test's eyes only."""

    beats: dict[str, int]
    digests: dict[str, str]
    paused: ClockReading
    saved: ClockReading
    jumped: ClockReading
    early: tuple[ClockReading, ClockReading]


def digest(fd: int, size: int) -> str:
    with ExtentTable.scan_fd(fd, size) as table:
        return table.digest()


def region(name: str) -> str:
    return f"region:{name}:0"


def state(name: str) -> str:
    return f"state:{name}"


def sweep(guest: CanaryGuest, within: float) -> tuple[int, int]:
    """Have a canary check every page at once: how many were checked, and how many bytes are wrong."""
    answer = guest._ask(Type.SWEEP, within, patient=True)
    return answer.pages, answer.wrong


def until_swept(guest: CanaryGuest, pages: int) -> None:
    """Wait until a canary has stamped and checked all of its memory by itself."""
    progress = guest.progress()
    assert progress is not None
    goal = progress.checked + pages
    deadline = time.monotonic() + 900
    while (now := guest.progress()) is not None and now.checked < goal:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def births(custody: KeeperCustody, hub: Hub) -> dict[str, CanaryGuest]:
    """The guests, each with a region in custody."""
    Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("advise")
    guests = {}
    for name, size in GUESTS.items():
        (fd,) = memfd.reserve_segments(name, size)
        custody.put(region(name), fd, name.encode())
        guests[name] = CanaryGuest.start(name, hub, RUNTIME / "vmm" / name, args=["--as", "kvm"], within=60)
        mine = memfd.segment_fd(fd, Access.RW)
        assert guests[name].offer(Offer(f"g-{name}", mine, 0, size, Access.RW, 0), 30)
        os.close(mine)
        os.close(fd)
    for name, guest in guests.items():
        until_swept(guest, 2 * GUESTS[name] // 4096)
    return guests


def adopted(custody: KeeperCustody, hub: Hub, found: bootplan.Resumed) -> CanaryGuest:
    """A guest memconsole-resume started, with the grant it has."""
    fd, _ = custody.get(region(found.guest))
    try:
        offer = Offer(f"g-{found.guest}", fd, 0, GUESTS[found.guest], Access.RW, 0)
        return CanaryGuest.adopt(found.guest, found.pid, found.start_ticks, hub, [offer])
    finally:
        os.close(fd)


def preserve(custody: KeeperCustody) -> tuple[list[Hold], list[Verify], dict[str, str]]:
    """One session a guest, in the keeper's custody; where each page is afterwards."""
    holds, verifies, digests = [], [], {}
    for name, size in GUESTS.items():
        fd, payload = custody.get(region(name))
        with luo.LuoSession.create(luo.session_name(name)) as session:
            session.preserve(fd, 1)
            custody.put(f"session:{name}", session.fd)
        digests[name] = digest(fd, size)
        wrong = HOW == "moved" and name == "two"
        holds.append(Hold(luo.session_name(name), 1, region(name), payload))
        verifies.append(Verify(region(name), size, "00" * 16 if wrong else digests[name]))
        os.close(fd)
    return holds, verifies, digests


def save(
    custody: KeeperCustody, session: luo.LuoSession, name: str, guest: CanaryGuest, token: int
) -> tuple[Hold, Start]:
    """A guest's state, preserved, and how it goes on from it."""
    fd = os.memfd_create(state(name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    guest.save(fd, 10)
    if HOW == "unfit" and name == "one":
        os.pwrite(fd, b"!", 500)
    custody.put(state(name), fd)
    session.preserve(fd, token)
    os.close(fd)
    again = guest.restart(RUNTIME / "agents", state(name), [(f"g-{name}", region(name))])
    directory = RUNTIME / "vmm" / name
    start = Start(name, again.words, str(directory), str(directory / "log"), again.fds)
    return Hold(bootplan.MANIFEST_SESSION, token, state(name)), start


def jump(custody: KeeperCustody, guests: dict[str, CanaryGuest], early: ClockReading) -> None:
    holds, verifies, digests = preserve(custody)
    lab.load()
    paused = bootplan.moment()
    manifest = os.memfd_create("manifest", os.MFD_CLOEXEC)
    starts, beats = [], {}
    with luo.LuoSession.create(bootplan.MANIFEST_SESSION) as session:
        for token, (name, guest) in enumerate(guests.items(), 2):
            hold, start = save(custody, session, name, guest, token)
            holds.append(hold)
            starts.append(start)
            progress = guest.progress()
            assert progress is not None
            beats[name] = progress.beats
        if HOW == "unfit":
            holds.append(Hold("memconsole:nobody", 1, "region:nobody:0"))
        saved = bootplan.moment()
        raw = bytearray(bootplan.encode(BootPlan(tuple(holds), tuple(verifies), tuple(starts), (), saved)))
        if HOW == "broken":
            raw[-20] ^= 1
        os.write(manifest, raw)
        session.preserve(manifest, bootplan.MANIFEST_TOKEN)
        custody.put("session:manifest", session.fd)
    jumped = bootplan.moment()
    NOTES.write_bytes(msgspec.json.encode(Notes(beats, digests, paused, saved, jumped, (early, jumped))))
    os.sync()
    custody.jump()


def first() -> None:
    RUNTIME.mkdir(exist_ok=True)
    custody = KeeperCustody.start(RUNTIME)
    early = bootplan.moment()
    code, err = Path("/run/resume.code").read_text(), Path("/run/resume.err").read_text()
    lab.say("nothing", code == "6\n" and not custody.names(), code=code, err=err)
    try:
        custody.jump()
    except KernelRefused as error:
        lab.say("not-loaded", error.code == "NotLoaded", text=str(error))
    hub = Hub(RUNTIME / "agents")
    guests = births(custody, hub)
    for name, guest in guests.items():
        pages, wrong = sweep(guest, 30)
        lab.say(f"swept-{name}", (pages, wrong) == (GUESTS[name] // 4096 - 4, 0), progress=str(guest.progress()))
    jump(custody, guests, early)


def later(code: int, err: str) -> None:
    notes = msgspec.json.decode(NOTES.read_bytes(), type=Notes)
    custody = KeeperCustody(RUNTIME / "keeper")
    fd, _ = custody.get(bootplan.RESUME)
    resume = bootplan.read_resume(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    held = custody.names()
    lab.say(
        "resume",
        code == (4 if HOW else 0),
        code=code,
        err=err,
        held=held,
        guests=msgspec.to_builtins(resume.guests),
        findings=msgspec.to_builtins(resume.findings),
    )
    regions = {region(name) for name in GUESTS}
    lab.say("custody", regions | {bootplan.MANIFEST, bootplan.RESUME} <= set(held), held=held)
    lab.say("open-sessions", [name for name in held if name.startswith(bootplan.INCOMING)] == unfinished(), held=held)
    for name, size in GUESTS.items():
        fd, payload = custody.get(region(name))
        same = digest(fd, size) == notes.digests[name]
        lab.say(f"frames-{name}", same and payload == name.encode() and os.fstat(fd).st_size == size)
        os.close(fd)
    began = {phase.name: phase.at for phase in resume.phases}
    kernels = [notes.early, (began["begun"], bootplan.moment())]
    phases = {phase.name: bootplan.between(notes.paused, phase.at, kernels) // 1000 for phase in resume.phases}
    phases["saved"] = bootplan.between(notes.paused, notes.saved, kernels) // 1000
    phases["jumped"] = bootplan.between(notes.paused, notes.jumped, kernels) // 1000
    phases["kernel"] = phases["begun"] - began["begun"].boottime_ns // 1000
    lab.say("phases", sorted(phases.values()) == [phases[name] for name in ORDER], phases_us=phases)
    hub = Hub(RUNTIME / "agents")
    guests = {found.guest: adopted(custody, hub, found) for found in resume.guests if found.state == "started"}
    lab.say("goes-on", sorted(guests) == goes_on(), guests=sorted(guests))
    for name, guest in guests.items():
        look(name, guest, hub, notes)
    if lab.stage() == 2 and not HOW:
        jump(custody, guests, began["begun"])
    trouble(custody, notes)
    lab.say("end")


ORDER = ["saved", "jumped", "kernel", *("begun", "keeper", "planned", "retrieved", "verified")]
ORDER += ["started", "resumed", "finished"]


def goes_on() -> list[str]:
    """The guests that must run again."""
    return sorted({"": set(GUESTS), "broken": set(), "moved": {"one", "three"}, "unfit": {"two", "three"}}[HOW])


def unfinished() -> list[str]:
    """The sessions that must be kept open."""
    names = [*(luo.session_name(name) for name in GUESTS), bootplan.MANIFEST_SESSION]
    return sorted(bootplan.INCOMING + name for name in names) if HOW == "broken" else []


def look(name: str, guest: CanaryGuest, hub: Hub, notes: Notes) -> None:
    """A guest after a jump: it is the same one, it counts on, and all of its memory is right."""
    assert hub.connected(name, 900)
    progress = guest.progress()
    assert progress is not None
    pages, wrong = sweep(guest, 900)
    until_swept(guest, 1024)
    restored, blackout = guest.blackout()
    after = guest.progress()
    assert after is not None
    lab.say(
        f"guest-{name}",
        progress.beats > notes.beats[name]
        and (pages, wrong, after.wrong) == (GUESTS[name] // 4096 - 4, 0, 0)
        and progress.runs_as == "kvm"
        and restored == lab.stage() - 1
        and blackout > 0,
        before=notes.beats[name],
        beats=progress.beats,
        blackout_ms=blackout / 1e6,
        restored=restored,
        why=after.why,
    )


def trouble(custody: KeeperCustody, notes: Notes) -> None:
    """What was held back can go on later: its state and its memory are all there is to it."""
    for name in set(GUESTS) - set(goes_on()) if HOW in {"moved", "broken"} else ():
        plan = BootPlan((Hold("x", 1, region(name)), Hold("x", 2, state(name))), (), (start_of(name),))
        fd = os.memfd_create("manifest")
        os.write(fd, bootplan.encode(plan))
        custody.put(bootplan.MANIFEST, fd)
        os.close(fd)
        custody.drop(bootplan.RESUME)  # it would say that all of this was done
        done = subprocess.run([program("memconsole-resume"), "--rehearse"], capture_output=True, text=True, check=False)
        fd, _ = custody.get(bootplan.RESUME)
        (found,) = bootplan.read_resume(os.pread(fd, 1 << 20, 0)).guests
        os.close(fd)
        hub = Hub(RUNTIME / "agents")
        look(name, adopted(custody, hub, found), hub, notes)
        hub.close()
        lab.say(f"later-{name}", done.returncode == 0, err=done.stderr)


def start_of(name: str) -> Start:
    words = (program("memconsole-canary"), "--socket", str(RUNTIME / "agents"), "--name", name, "--restore", "3")
    return Start(
        name, (*words, "--give", f"g-{name}=4"), "/tmp", f"/tmp/{name}.log", ((state(name), 3), (region(name), 4))
    )


def homeless(code: int, err: str) -> None:
    """No keeper could be had: a process that does nothing else has every fd, and the guests run."""
    lab.say("resume", code == 4, code=code, err=err)
    holders = [path.parent for path in Path("/proc").glob("[0-9]*/comm") if _read(path) == "mc-holder"]
    links = [path.readlink().name for path in (holders[0] / "fd").iterdir()] if holders else []
    sizes = {path.stat().st_size for path in (holders[0] / "fd").iterdir()} if holders else set()
    sessions = sum("luo_session" in link for link in links)
    lab.say(
        "holder",
        len(holders) == 1 and sizes >= set(GUESTS.values()) and sessions == len(GUESTS) + 1,
        links=links,
        sizes=sorted(sizes),
    )
    running = [path for path in Path("/proc").glob("[0-9]*/comm") if _read(path) in GUESTS]
    lab.say("goes-on", len(running) == len(GUESTS))
    lab.say("end")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # it ended


def main() -> None:
    if lab.stage() == 1:
        return first()
    if HOW == "homeless":
        return homeless(int(Path("/run/resume.code").read_text()), Path("/run/resume.err").read_text())
    return later(int(Path("/run/resume.code").read_text()), Path("/run/resume.err").read_text())


try:
    main()
except (MemconsoleError, AssertionError, OSError) as error:
    import traceback

    logs = {str(path): path.read_text()[-500:] for path in RUNTIME.glob("guests/*/log")}
    lab.say("exception", ok=False, text=f"{error!r}", trace=traceback.format_exc()[-1500:], logs=logs)
