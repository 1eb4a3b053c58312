"""Regions of the dax store on a kernel that hands nothing over: made, granted, taken back, handed off, found again.

arena N [wordless]  so many handoffs of a canary, a memcached and a region that nobody has; then a kexec like any other,
                    or two: the first one to a kernel that does not set the range aside
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from support import lab_guest as lab
from support import lab_host as host
from support.memcached import LEAST_MIB, Memcached
from support.waiting import until

from memconsole import actions as do
from memconsole import paths
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.wire.client import Client
from memconsole.errors import MemconsoleError
from memconsole.model import Outcome, RevokeOutcome, Rung

M = 1 << 20
SIZE = 8 * M
NOTE = lab.SHARE / "note"
"""What the next kernel is to find: digests and frames by region, and the canary's beats."""
HANDOFFS = int(sys.argv[1])
WORDLESS = "wordless" in sys.argv
LAST = HANDOFFS + 2 + WORDLESS
WORD = "memmap=256M!1G"
KEPT = lab.SHARE / "arenas.json"
"""What the service noted in its state directory, which is on a disk on other hosts."""
MOUNT = ("--mount", "/run/memory")
HOME = lab.SHARE / "home"
"""On a disk, so to speak: what memcached writes down when it is told to save is there in the next kernel."""
SOCKET = Path("/run/mc.sock")
MC = Memcached(SOCKET, host.PATIENCE)
ITEMS = 500


def contents(client: Client, region: str) -> str:
    """A digest of all bytes of a region."""
    del client
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    try:
        fd, _ = keeper.get(f"region:{region}:0")
        with os.fdopen(fd, "rb") as file:
            file.seek(0)  # where it stands is the same for all who have it
            return hashlib.file_digest(file, "sha256").hexdigest()
    finally:
        keeper.close()


def make(client: Client) -> None:
    code, text = host.said("arena", "list", "--json")
    (here,) = json.loads(text)
    lab.say("range", here["holds"] == "nothing" and here["words"] == WORD and not code, list=text)
    lab.say("nothing-yet", host.refused(client, do.Reserve("r", SIZE, "dax")) == "NoArena")
    outcome = client.apply(do.ArenaCreate("lab"))
    lab.say("created", "arena lab is on /dev/pmem0" in outcome.text, text=outcome.text)
    lab.say("again", host.refused(client, do.ArenaCreate("more")) == "InUse")
    client.apply(do.Reserve("still", SIZE, "dax", prefault=True))
    client.apply(do.GuestStart("can", memory=SIZE, store="dax"))
    wanted = {"lazy": do.Map("still", "can", lazy=True), "small": do.Reserve("odd", M, "dax")}
    names = {name: host.refused(client, action) for name, action in wanted.items()}
    lab.say("refused", names == {"lazy": "NotLazy", "small": "BadSize"}, names=names)
    runs = {name: host.frames(client, f"region:{name}") for name in ("still", "can")}
    inside = all(len(each) == 1 and 0x40000 <= each[0][0] < 0x50000 and not each[0][0] % 512 for each in runs.values())
    lab.say("frames", inside, runs=runs)
    seen = host.beaten(client, "can")
    pid = host.guest(host.shown(client), "can").pid
    with client.extents("guest:can") as table:
        mapped = [(row.pfn, row.count) for row in table]
    lab.say("mapped", seen.wrong == 0 and mapped[0][0] == runs["can"][0][0], pid=pid, mapped=mapped[:4])


def taken_back(client: Client) -> Outcome:
    """A grant of the region that stands still, whose guest does not give it back by itself."""
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, start_new_session=True
    )
    client.apply(do.GuestAttach("proc", holder.pid))
    keeper = KeeperCustody(paths.runtime_dir() / "keeper")
    fd, _ = keeper.get("region:still:0")
    keeper.close()
    os.pwrite(fd, b"kept", 5 * M)
    grant = client.apply(do.Map("still", "proc")).subject
    before = contents(client, "still")
    outcome = client.apply(do.Revoke(grant))
    grown = ""
    try:
        os.pwrite(fd, b"again", SIZE)
        grown = "written"
    except OSError as error:
        grown = str(error)
    same = contents(client, "still") == before
    lab.say(
        "revoked",
        same and os.fstat(fd).st_size == 0,
        grown=grown,
        report=str(outcome.revoke),
        runs=host.frames(client, "region:still"),
    )
    os.close(fd)
    holder.kill()
    holder.wait()
    client.apply(do.GuestStop("proc"))
    return outcome


def cached(client: Client) -> None:
    """A memcached on a region of the arena that is a file of its user, with items; it needs no grant."""
    HOME.mkdir()
    (HOME / "mc").symlink_to("/run/memory/files/mc/cache")
    client.apply(do.Reserve("mc", LEAST_MIB * M, "dax", path="mc/cache", owner="root"))
    command = f"memcached -u root -s {SOCKET} -m {LEAST_MIB} -t 1 -e {HOME}/mc"
    ready = f"test -S {SOCKET}"
    client.apply(do.GuestService("mc", exec=command, save_signal="USR1", ready=ready, within=host.PATIENCE))
    client.apply(do.GuestResume("mc"))
    until(MC.answers, "memcached answers", host.PATIENCE)
    MC.fill(ITEMS)


def first() -> None:
    client = host.serve(*MOUNT)
    make(client)
    taken_back(client)
    beats = host.beaten(client, "can").beats
    client = host.killed(client, *MOUNT)
    seen = host.beaten(client, "can", beats)
    lab.say("killed", seen.wrong == 0 and not host.findings(client), findings=host.findings(client), beats=seen.beats)
    code, text = host.said("arena", "check", "--json")
    lab.say("checked", code == 0, text=text)
    cached(client)
    jump(client)


def places(client: Client) -> dict[str, list[list[int]]]:
    return {name: [list(row) for row in host.frames(client, f"region:{name}")] for name in ("still", "can", "mc")}


def jump(client: Client) -> None:
    """A handoff by memconsole."""
    progress = host.beaten(client, "can")
    note = {"still": contents(client, "still"), "frames": places(client), "beats": progress.beats}
    NOTE.write_text(json.dumps(note))
    host.hand_off(client)


def landed() -> Client:
    """Behind a handoff everybody goes on where he was, and every page is where it was."""
    before = json.loads(NOTE.read_text())
    code, log = host.early()
    lab.say("early", code == "0" and "replayed" not in log, code=code, log=log)
    client = host.serve(*MOUNT)
    progress = host.beaten(client, "can", before["beats"])
    lab.say("goes-on", progress.wrong == 0, before=before["beats"], progress=str(progress))
    until(MC.answers, "memcached is started, and answers", host.PATIENCE)
    missing = MC.missing(range(ITEMS))
    lab.say("warm", not missing, missing=missing)
    now = (contents(client, "still"), places(client))
    lab.say("stands", now == (before["still"], before["frames"]), now=now, before=before)
    until(lambda: all(each.back for each in host.reported(client).guests), "all are back in the report", host.PATIENCE)
    report = host.reported(client)
    names = sorted(each.name for each in report.regions)
    lab.say("report", names == ["can", "mc", "still"] and all(each.same for each in report.regions), report=str(report))
    found = host.findings(client)
    lab.say("findings", not found, findings=found)
    return client


def leave(client: Client) -> None:
    """A kexec that memconsole has no part in; what is not asked to save is not saved."""
    grant = next(each for each in host.shown(client).grants if each.region == "mc")
    outcome = client.apply(do.Revoke(grant.id, at_most=Rung.KILL))
    proved = outcome.revoke is not None and outcome.revoke.outcome is RevokeOutcome.PROVED
    lab.say("taken", proved, text=outcome.text)
    for guest in ("can", "mc", "user-root"):
        client.apply(do.GuestStop(guest))
    digests = {name: contents(client, name) for name in ("still", "can", "mc")}
    NOTE.write_text(json.dumps({"digests": digests, "frames": places(client)}))
    host.end(client)
    line = lab.next_command_line()
    if WORDLESS:
        line = line.replace(WORD, "mem=1G")  # and this kernel uses nothing of the range
        KEPT.write_bytes(Path(host.STATE, "arenas.json").read_bytes())
    lab.load(line)
    lab.jump()


def wordless() -> None:
    """A kernel that knows nothing of the range says whose it was, and with which word it comes back."""
    Path(host.STATE).mkdir()
    Path(host.STATE, "arenas.json").write_bytes(KEPT.read_bytes())
    client = host.serve()
    missing = {name: what for name, what in host.findings(client) if name == "arena-missing"}
    lab.say("missing", WORD in missing.get("arena-missing", ""), missing=missing)
    lab.say("no-region", host.refused(client, do.Reserve("r", SIZE, "dax")) == "NoArena")
    host.end(client)
    lab.load(lab.next_command_line().replace("mem=1G", WORD))
    lab.jump()


def last() -> None:
    client = host.serve()
    before = json.loads(NOTE.read_text())
    regions = host.shown(client).regions
    paths = [region.file.path for region in regions if region.file is not None]
    lab.say("users-file", paths == ["mc/cache"], paths=paths)
    found = {region.name: str(region.store) for region in regions}
    lab.say("found", found == dict.fromkeys(before["digests"], "dax"), found=found, findings=host.findings(client))
    now = {"digests": {name: contents(client, name) for name in before["digests"]}, "frames": places(client)}
    lab.say("same", now == before, now=now, before=before)
    for name in found:
        client.apply(do.Release(name))
    code, text = host.said("arena", "list", "--json")
    lab.say("released", json.loads(text)[0]["regions"] == [] and not code, text=text)
    lab.say("removed", client.apply(do.ArenaRemove("lab")).text)
    _, text = host.said("arena", "list", "--json")
    lab.say("empty", json.loads(text)[0]["holds"] == "nothing", text=text)
    host.end(client)
    lab.say("end")


def main() -> None:
    if lab.stage() == 1:
        first()
    elif lab.stage() == LAST:
        last()
    elif lab.stage() == HANDOFFS + 2:
        wordless()
    else:
        client = landed()
        jump(client) if lab.stage() <= HANDOFFS else leave(client)


try:
    main()
except MemconsoleError as error:
    lab.say("failed", ok=False, code=error.code, what=str(error))
    raise
